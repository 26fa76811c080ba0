"""The plain twin: the same service as one would first write it, with torch and transformers.

The model is DistilBERT-multilingual's architecture, unquantized, its files under
gs://$BUCKET/plain/ (random weights take the same time); the first request
downloads and loads them.
"""

import functools
import os
import tempfile
from pathlib import Path

import torch
from google.cloud import storage
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast


@functools.cache
def load():
    """The tokenizer and the model."""
    folder = Path(tempfile.mkdtemp())
    for blob in storage.Client(project="_").list_blobs(os.environ["BUCKET"], prefix="plain/"):
        blob.download_to_filename(folder / Path(blob.name).name)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    return tokenizer, AutoModelForSequenceClassification.from_pretrained(folder).eval()


def needs(request):
    """One probability a label."""
    tokenizer, model = load()
    inputs = tokenizer(request.get_json()["text"], return_tensors="pt", truncation=True, max_length=256)
    with torch.no_grad():
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    scores = torch.sigmoid(logits)[0].tolist()
    return {"scores": {model.config.id2label[i]: round(score, 4) for i, score in enumerate(scores)}}
