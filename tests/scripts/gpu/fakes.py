"""A section whose items end in every way that items can end."""

import os
import sys
import time


def items(facts):
    """What the facts ask for."""
    if facts.get("plan") == "broken":
        raise RuntimeError("no plan")
    if facts.get("plan") == "dies":
        os._exit(9)
    return [{"key": key} for key in facts["keys"]]


def run(item, facts):
    """Do what the key says."""
    match item["key"].split()[0]:
        case "raises":
            raise ValueError("wrong shape")
        case "crashes":
            print("illegal address", file=sys.stderr)
            os._exit(7)
        case "hangs":
            time.sleep(1000)
        case "slow":
            time.sleep(0.7)
    return {"square": int(item["key"].split()[1]) ** 2, "worker": os.getpid()}
