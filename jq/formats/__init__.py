"""Checkpoints of other tools: GPTQ, AWQ and compressed-tensors, read into QTensors and written.

words.py, arrays.py                          packing, and what the formats share
gptq.py, awq.py, compressed_tensors.py       one linear: to_qtensor, from_qtensor
quant_config.py, ct_config.py                quantization_config -> the scheme of each linear
reader.py                                    a folder -> params
plan.py, config_json.py                      which scheme writes a linear, and config.json
export.py, shards.py, convert.py             params -> a folder; a folder -> another format
"""
