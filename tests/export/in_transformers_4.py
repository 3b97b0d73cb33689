"""Run by test_transformers_4.py in an environment with transformers 4: loads exports, saves their outputs.

usage: in_transformers_4.py FOLDER ...; each FOLDER holds inputs.safetensors (images, noise, pixels) and the
exports hf, hf-mae, timm; or, of text, inputs.safetensors (tokens), texts.json and the export hf. Prints the
version of transformers, then a line per folder: its name and the weights that were missing or unexpected.
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file


def load(kind: type, folder: Path, **options) -> torch.nn.Module:
    model, info = kind.from_pretrained(folder, output_loading_info=True, **options)
    faults = [key for fault in ("missing", "unexpected", "mismatched") for key in info[f"{fault}_keys"]]
    if faults:
        raise LookupError(" ".join(faults))
    return model.eval()


@torch.inference_mode()
def outputs(folder: Path) -> dict[str, torch.Tensor]:
    inputs = load_file(folder / "inputs.safetensors")
    vit = load(transformers.ViTModel, folder / "hf", add_pooling_layer=False)
    mae = load(transformers.ViTMAEForPreTraining, folder / "hf-mae")
    wrapped = load(transformers.AutoModel, folder / "timm")
    found = {}
    for dtype in (torch.float32, torch.float64):
        name, images = str(dtype).removeprefix("torch."), inputs["images"].to(dtype)
        output = mae.to(dtype)(images, noise=inputs["noise"])
        found |= {f"prediction.{name}": output.logits, f"loss.{name}": output.loss, "mask": output.mask}
        found[f"hf.{name}"] = vit.to(dtype)(images).last_hidden_state
        found[f"timm.{name}"] = wrapped.to(dtype)(images).last_hidden_state
    for name in ("hf", "hf-mae"):
        processor = transformers.AutoImageProcessor.from_pretrained(folder / name)
        processed = processor(inputs["pixels"].numpy(), return_tensors="pt")["pixel_values"]
        found[f"pixels.{name}"] = torch.as_tensor(processed)
    return {name: tensor.clone().contiguous() for name, tensor in found.items()}


@torch.inference_mode()
def text_outputs(folder: Path) -> dict[str, torch.Tensor]:
    """Logits, what the tokenizer makes of texts, and the shape of a tie."""
    tokens = load_file(folder / "inputs.safetensors")["tokens"]
    kind = json.loads((folder / "hf" / "config.json").read_text())["architectures"][0]
    model = load(getattr(transformers, kind), folder / "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "hf")
    texts = json.loads((folder / "texts.json").read_text())
    found = {"ids": torch.tensor([i for text in texts for i in tokenizer(text)["input_ids"]])}
    decoded = [tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) for text in texts]
    (folder / "decoded.json").write_text(json.dumps(decoded))
    found["tied"] = torch.tensor(model.get_output_embeddings().weight is model.get_input_embeddings().weight)
    for dtype in (torch.float32, torch.float64):
        output = model.to(dtype)(tokens)
        logits = output.prediction_logits if kind.endswith("PreTraining") else output.logits
        found[f"logits.{str(dtype).removeprefix('torch.')}"] = logits
    return {name: tensor.clone().contiguous() for name, tensor in found.items()}


def main() -> None:
    print(transformers.__version__)
    for folder in map(Path, sys.argv[1:]):
        try:
            found = text_outputs(folder) if (folder / "texts.json").exists() else outputs(folder)
            save_file(found, folder / "outputs.safetensors")
            print(folder.name)
        except LookupError as error:
            print(folder.name, error)


if __name__ == "__main__":
    main()
