"""Checkpoints of other tools: GPTQ, AWQ and compressed-tensors, read into QTensors and written.

words.py, arrays.py                          packing, and what the formats share
gptq.py, awq.py, compressed_tensors.py       one linear: to_qtensor, from_qtensor
quant_config.py                              quantization_config -> the scheme of each linear
reader.py                                    a folder -> params
"""
