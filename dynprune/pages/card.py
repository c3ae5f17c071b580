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
    name = f"{survey.model.split(':')[-1].split('.')[-1]}-{Path(survey.data).name}-compact"
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
    classes = survey.answers.classes if survey.answers else []
    lines = [f"# {name}", ""]
    lines.append(
        f"A compact `{survey.model}`, trained on `{Path(survey.data).name}` with dynamic channel execution "
        "(Spasov & Liò, BMVC 2019)."
        if survey.command == "train"
        else f"A compact `{survey.model}`, made from a trained one on `{Path(survey.data).name}`: channels that the "
        "rest can make up for were removed, the others refitted."
    )
    lines += ["", "| | |", "|---|---|"]
    if survey.accuracy is not None:
        where = compact.get("test_data") or survey.results.get("train", {}).get("test_data", "")
        lines.append(f"| test accuracy | {100 * survey.accuracy:.2f} % ({where}) |")
    for label, key in (("multiply-accumulates", "macs"), ("parameters", "params")):
        if compact.get(key) and compact.get(f"dense_{key}"):
            share = compact[f"dense_{key}"] / compact[key]
            lines.append(f"| {label} | {digits(compact[key])} ({share:.2f}x fewer than dense) |")
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
        "`compact.onnx` carries its class names and its preprocessing (metadata entry `preprocess`).",
        "",
        "```python",
        "import dynprune",
        "",
        'print(dynprune.predict("compact.onnx", ["photo.jpg"])[0].classes)',
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
        'api.upload_folder(repo_id=name, folder_path=".", allow_patterns=["compact*.onnx", "compact.safetensors"])',
        'api.upload_file(repo_id=name, path_or_fileobj="MODEL_CARD.md", path_in_repo="README.md")',
        "```",
        "",
        "Add the licence of your weights and data to the lines at the top before you do.",
    ]
    return lines
