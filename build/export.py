"""Export: a checkpoint in, one fp32 ONNX file with fused operators out.

The graph takes the token ids of one text, unpadded, and gives its logits: that
is all that the function ever runs. PyTorch's TorchScript exporter with attention
written out is used on purpose: of the newer exporter's graph ONNX Runtime's
optimizer fuses no attention at all. The nodes that it must fuse are counted.

A fine-tuned model of one's own comes in here too, with the pooling and head
that `…ForSequenceClassification.save_pretrained` wrote: its vocabulary is
trimmed on the way.

    python -m build.export --checkpoint dir:.local/build/checkpoint
"""

import argparse
import warnings
from dataclasses import asdict
from pathlib import Path

import onnx
import torch
from onnxruntime.transformers import optimizer

from build.exported import FP32, PLAIN
from training.examples import read_dataset
from training.files import replace_folder, write_json
from training.model import Checkpoint, NeedsClassifier, encoder_layers, encoder_of, load_checkpoint
from training.vocabulary import DEFAULT_SCRIPTS, trim_vocabulary

OPSET = 17


class ExportError(ValueError):
    """The checkpoint cannot be exported as the function needs it."""


class _OneText(torch.nn.Module):
    """int64 [1, T] ids to float32 [1, L] logits; nothing is padding."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        own = isinstance(self.model, NeedsClassifier)
        mask = None if own else torch.ones_like(input_ids)  # another's has it in its graph for fusion to find
        logits: torch.Tensor = self.model(input_ids=input_ids, attention_mask=mask).logits
        return logits


def import_checkpoint(source: Path, output: Path, texts: list[str], scripts: tuple[str, ...]) -> Path:
    """A folder with a trimmed vocabulary: `source` itself where that was done before training."""
    if (source / "checkpoint.json").exists():
        return source
    counts = trim_vocabulary(source, output, texts, scripts)
    print("vocabulary: {pieces_before} pieces before, {pieces_after} after".format(**counts))
    return output


def export(checkpoint: Checkpoint, output: Path, source: Path) -> dict:
    """Write model.plain.onnx, model.fp32.onnx (fused), tokenizer.json and export.json into the folder `output`.

    `source` is the folder that the checkpoint was loaded from; `build.verify`
    compares against it. Returns what export.json says. Raises ExportError where fused nodes are missing.
    """
    with replace_folder(output) as new:
        trace(checkpoint, new / PLAIN)
        encoder = encoder_of(checkpoint.model)
        fused = optimizer.optimize_model(
            str(new / PLAIN),
            model_type="bert",
            num_heads=encoder.config.num_attention_heads,
            hidden_size=encoder.config.hidden_size,
            opt_level=0,
        )
        nodes = check_fusion(fused.get_fused_operator_statistics(), len(encoder_layers(encoder)))
        fused.save_model_to_file(str(new / FP32))
        checkpoint.tokenizer.save(str(new / "tokenizer.json"))
        made = {
            "labels": [asdict(label) for label in checkpoint.labels],
            "prefix": checkpoint.prefix,
            "max_tokens": checkpoint.max_tokens,
            "provenance": checkpoint.provenance,
            "checkpoint": str(source),
            "fused_nodes": nodes,
            "nodes": {name: len(onnx.load(new / name).graph.node) for name in (PLAIN, FP32)},
        }
        write_json(new / "export.json", made)
    return made


def check_fusion(counts: dict[str, int], layers: int) -> dict[str, int]:
    """The fused nodes by kind. Raises ExportError unless every layer's attention, norms and GELU are fused."""
    expected = {"Attention": layers, "SkipLayerNormalization": 2 * layers, "BiasGelu": layers}
    missing = {kind: counts.get(kind, 0) for kind, least in expected.items() if counts.get(kind, 0) < least}
    if missing:
        raise ExportError(
            f"fusion: expected at least {expected}, found {missing}; "
            "export with the TorchScript exporter and attn_implementation='eager', "
            "and compare the versions of torch, transformers and onnxruntime with training/requirements.txt"
        )
    return {kind: count for kind, count in counts.items() if count}


def trace(checkpoint: Checkpoint, path: Path) -> None:
    """Write the graph of one unpadded text, as PyTorch's TorchScript exporter makes it."""
    ids = torch.tensor([checkpoint.tokenizer.encode(checkpoint.prefix + "내보내기").ids])
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's deprecation and the tracer's constants, both known
        torch.onnx.export(
            _OneText(checkpoint.model),
            (ids,),
            str(path),
            input_names=["input_ids"],
            output_names=["logits"],
            dynamic_axes={"input_ids": {1: "tokens"}},
            opset_version=OPSET,
            dynamo=False,
        )


def main() -> None:
    """Export a checkpoint; one that did not come from this project is trimmed first."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--checkpoint", default="dir:.local/build/checkpoint", help="dir:<path>")
    parser.add_argument("--data", type=Path, help="a data folder; the pieces of its training texts are kept too")
    parser.add_argument("--scripts", default=",".join(DEFAULT_SCRIPTS))
    parser.add_argument("--max-tokens", type=int, help="of one window; the checkpoint's own unless told")
    parser.add_argument("--output", type=Path, default=Path(".local/build/onnx"))
    args = parser.parse_args()
    kind, _, path = args.checkpoint.partition(":")
    if kind != "dir" or not Path(path).is_dir():
        raise SystemExit(f"--checkpoint: expected dir:<path> of a folder, found {args.checkpoint!r}; name one")
    try:
        texts = read_dataset(args.data).train.texts if args.data else []
        folder = import_checkpoint(
            Path(path), args.output.with_name("imported"), texts, tuple(args.scripts.upper().split(","))
        )
        checkpoint = load_checkpoint(folder)
        checkpoint.max_tokens = args.max_tokens or checkpoint.max_tokens
        made = export(checkpoint, args.output, folder)
    except ValueError as error:  # DataError, VocabularyError and ExportError among them
        raise SystemExit(str(error)) from None
    print(f"{made['nodes'][PLAIN]} nodes as exported, {made['nodes'][FP32]} after fusion: {made['fused_nodes']}")


if __name__ == "__main__":
    main()
