"""The plain twin: the same service as one would first write it, with torch and transformers.

The model is DistilBERT-multilingual's architecture, unquantized, from the folder
CHECKPOINT (random weights take the same time).
"""

import os

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

tokenizer = PreTrainedTokenizerFast(tokenizer_file=os.environ["CHECKPOINT"] + "/tokenizer.json")
model = AutoModelForSequenceClassification.from_pretrained(os.environ["CHECKPOINT"]).eval()


def needs(request):
    """One probability a label."""
    inputs = tokenizer(request.get_json()["text"], return_tensors="pt", truncation=True, max_length=256)
    with torch.no_grad():
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    scores = torch.sigmoid(logits)[0].tolist()
    return {"scores": {model.config.id2label[i]: round(score, 4) for i, score in enumerate(scores)}}
