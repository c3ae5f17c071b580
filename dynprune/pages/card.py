"""A model card: what a network is, how good and how fast, and how to use it, as model hubs read it.

Takes a survey; writes Markdown whose front matter Hugging Face's hub understands.
"""

from __future__ import annotations

import json
from pathlib import Path

from dynprune.files.disk import write_text
from dynprune.pages.survey import Survey
from dynprune.units import digits


def write_card(path: Path, survey: Survey) -> None:
    """Write the card. Raises DynpruneError where the file cannot be written."""
    write_text(path, card(survey))


def card(survey: Survey) -> str:
    kind = "gated" if survey.command == "gate" else "compact"
    name = f"{survey.model.split(':')[-1].split('.')[-1]}-{Path(survey.data).name}-{kind}"
    front = [
        "---",
        "library_name: dynprune",
        "pipeline_tag: image-classification",
        "tags: [image-classification, onnx, pruning, cnn]",
    ]
    if survey.accuracy is not None:
        front += [
            "model-index:",
            f"- name: {text(name)}",
            "  results:",
            "  - task: {type: image-classification}",
            f"    dataset: {{name: {text(Path(survey.data).name)}, type: {text(Path(survey.data).name)}}}",
            "    metrics:",
            f"    - {{type: accuracy, value: {survey.accuracy:.4f}, name: test accuracy}}",
        ]
    return "\n".join([*front, "---", "", *body(name, survey), ""])


def text(value: str) -> str:
    """As a YAML string; JSON's are."""
    return json.dumps(value)


def body(name: str, survey: Survey) -> list[str]:
    compact, bench = survey.results.get("compact", {}), survey.bench
    gates, file = survey.results.get("gate", {}), "gated" if survey.command == "gate" else "compact"
    classes = survey.answers.classes if survey.answers else []
    lines = [f"# {name}", ""]
    made_of = f"`{survey.model}`"
    data = f"`{Path(survey.data).name}`"
    lines.append(
        {
            "train": f"A compact {made_of}, trained on {data} with dynamic channel execution (Spasov & Liò, "
            "BMVC 2019).",
            "gate": f"A {made_of} with gates, trained on {data}: for each image they decide which channels to compute.",
        }.get(
            survey.command,
            f"A compact {made_of}, made from a trained one on {data}: channels that the rest can make up for were "
            "removed, the others refitted.",
        )
    )
    lines += ["", "| | |", "|---|---|"]
    if survey.accuracy is not None:
        told = (own.get("test_data") for own in (compact, gates, survey.results.get("train", {})))
        where = next(filter(None, told), "")
        lines.append(f"| test accuracy | {100 * survey.accuracy:.2f} % ({where}) |")
    for label, key in (("multiply-accumulates", "macs"), ("parameters", "params")):
        if compact.get(key) and compact.get(f"dense_{key}"):
            share = compact[f"dense_{key}"] / compact[key]
            lines.append(f"| {label} | {digits(compact[key])} ({share:.2f}x fewer than dense) |")
    if gates.get("dense_macs") and gates.get("macs"):
        share = gates["macs"] / gates["dense_macs"]
        lines.append(f"| multiply-accumulates | {digits(gates['macs'])} in the mean ({share:.3f} of without gates) |")
    if gates.get("verdict"):
        lines.append(f"| beside a static network | {gates['verdict']} |")
    if isinstance(bench.get("verdict"), str):
        where = bench.get("environment", {})
        processor, version = where.get("processor"), where.get("onnxruntime")
        lines.append(f"| time | {bench['verdict']}; {processor}, onnxruntime {version} |")
    for made in survey.results.get("export", {}).get("variants") or []:
        lines.append(f"| {made['kind']} | {100 * made['accuracy']:.2f} % on test images; {made['verdict']} |")
    if classes:
        shown = ", ".join(classes[:20]) + (f" and {len(classes) - 20} more" if len(classes) > 20 else "")
        lines += ["", f"Classes: {shown}."]
    lines += [
        "",
        "## Use",
        "",
        f"`{file}.onnx` carries its class names and its preprocessing (metadata entry `preprocess`).",
        "",
        "```python",
        "import dynprune",
        "",
        f'print(dynprune.predict("{file}.onnx", ["photo.jpg"])[0].classes)',
        "```",
        "",
        "Without dynprune, `dynprune guide predict` shows the ten lines of onnxruntime and numpy.",
        "",
        "## Limits",
        "",
        "Tested only on images like those it was trained on. The accuracy of single classes and the worst mistakes are "
        "in `report.html`.",
        "",
        "## To put it on a hub",
        "",
        "```python",
        "from huggingface_hub import HfApi",
        "",
        'api, name = HfApi(), "you/your-model"',
        "api.create_repo(name, exist_ok=True)",
        'api.upload_folder(repo_id=name, folder_path=".", allow_patterns=["FILE*.onnx", "FILE.safetensors"])'.replace(
            "FILE", file
        ),
        'api.upload_file(repo_id=name, path_or_fileobj="MODEL_CARD.md", path_in_repo="README.md")',
        "```",
        "",
        "Add the licence of your weights and data to the lines at the top before you do.",
    ]
    return lines
