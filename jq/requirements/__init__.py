"""What a run needs, what the machine has, and refusing before the work begins what cannot fit.

`run_of` describes a run, `requirements` says what it needs, `machine` what there is, `check`
refuses, and `estimate` says how long it will take.
"""

from jq.requirements.arithmetic import Arithmetic as Arithmetic
from jq.requirements.arithmetic import Rates as Rates
from jq.requirements.arithmetic import estimate as estimate
from jq.requirements.machine import Machine as Machine
from jq.requirements.machine import check as check
from jq.requirements.machine import machine as machine
from jq.requirements.memory import Requirements as Requirements
from jq.requirements.memory import requirements as requirements
from jq.requirements.workload import Block as Block
from jq.requirements.workload import Group as Group
from jq.requirements.workload import Run as Run
from jq.requirements.workload import run_of as run_of
