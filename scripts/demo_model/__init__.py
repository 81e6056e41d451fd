"""How the demonstration model is made: corpus, tokenizer, training, record.

`scripts/train_demo_model.py` runs it.
"""
