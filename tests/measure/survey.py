r"""Networks of other packages: traced, proven exact or "not shown", their state untouched.

`python -m tests.measure.survey [--out FILE]` measures them.

The packages are installed for this only:

    pip install transformers segmentation-models-pytorch monai pytorchcv kornia speechbrain torchaudio \
        efficientnet-pytorch vit-pytorch diffusers braindecode dynamic-network-architectures torchxrayvision \
        pretrainedmodels super-image open_clip_torch opencv-python-headless
    pip install --no-deps ultralytics facenet-pytorch

All weights are random; nothing is downloaded. `python -m tests.measure.survey table --out FILE` makes a Markdown table
of what was found.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
import warnings

import torch
from torch import Tensor

from dynprune import trace
from dynprune.errors import DynpruneError
from dynprune.state.attributes import attribute_values
from dynprune.structure.inspect import check_exactness, prunable_share

HF = "from transformers import {0}Config, {0}{1}"


def hf(
    kind: str, arguments: str = "", head: str = "ForImageClassification", size: str = "1x3x64x64"
) -> tuple[str, str, str, str, str]:
    return ("transformers", f"{kind} {head}", HF.format(kind, head), f"{kind}{head}({kind}Config({arguments}))", size)


def smp(name: str, encoder: str, size: str = "1x3x64x64", arguments: str = "") -> tuple[str, str, str, str, str]:
    return (
        "segmentation-models-pytorch",
        f"{name} {encoder}",
        "import segmentation_models_pytorch as smp",
        f"smp.{name}('{encoder}', encoder_weights=None, classes=4{arguments})",
        size,
    )


def cv(name: str, size: str = "1x3x224x224") -> tuple[str, str, str, str, str]:
    return (
        "pytorchcv",
        name,
        "from pytorchcv.model_provider import get_model",
        f"get_model('{name}', pretrained=False)",
        size,
    )


def yolo(name: str, kind: str = "DetectionModel", size: str = "1x3x128x128") -> tuple[str, str, str, str, str]:
    return (
        "ultralytics",
        name,
        f"from ultralytics.nn.tasks import {kind}",
        f"{kind}('{name}.yaml', verbose=False)",
        size,
    )


def monai(name: str, arguments: str, size: str) -> tuple[str, str, str, str, str]:
    return ("monai", name, f"from monai.networks.nets import {name}", f"{name}({arguments})", size)


NETWORKS = [
    yolo("yolov8n"),
    yolo("yolo11n"),
    yolo("yolov5n"),
    yolo("yolov10n"),
    yolo("yolov9t"),
    yolo("yolov8n-seg", "SegmentationModel"),
    yolo("yolov8n-pose", "PoseModel"),
    yolo("yolov8n-cls", "ClassificationModel"),
    yolo("yolo11n-obb", "OBBModel"),
    yolo("yolov8n-ghost"),
    yolo("yolov6n"),
    yolo("yolov3-tiny"),
    smp("Unet", "resnet18"),
    smp("Unet", "mobilenet_v2"),
    smp("UnetPlusPlus", "resnet18"),
    smp("FPN", "resnet18"),
    smp("DeepLabV3Plus", "resnet18", "2x3x64x64"),
    smp("Linknet", "resnet18"),
    smp("MAnet", "resnet18"),
    smp("PSPNet", "resnet18", "2x3x64x64"),
    smp("PAN", "resnet18", "1x3x128x128"),
    smp("UPerNet", "efficientnet-b0"),
    smp("Unet", "timm-regnety_002"),
    smp("Segformer", "resnet18"),
    smp("Unet", "densenet121"),
    smp("Unet", "vgg11_bn"),
    hf("ResNet", "embedding_size=16, hidden_sizes=[16, 32, 64, 64], depths=[1, 1, 1, 1]"),
    hf("RegNet", "embedding_size=16, hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 1, 1], groups_width=8"),
    hf("ConvNext", "hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 1, 1]"),
    hf("ConvNextV2", "hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 1, 1]"),
    hf("MobileNetV1"),
    hf("MobileNetV2"),
    hf("EfficientNet"),
    hf("Bit", "embedding_size=16, hidden_sizes=[32, 64, 96, 128], depths=[1, 1, 1, 1], num_groups=8"),
    hf("PoolFormer", "hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 1, 1]"),
    hf("FocalNet", "image_size=64, embed_dim=16"),
    hf("Swin", "image_size=64, embed_dim=24, depths=[1, 1, 1], num_heads=[2, 2, 2], window_size=4"),
    hf("MobileViT", "image_size=64"),
    hf("Segformer"),
    hf("Segformer", "", "ForSemanticSegmentation"),
    hf("Levit", "image_size=224", size="1x3x224x224"),
    hf("Dinov2", "hidden_size=48, num_attention_heads=3, num_hidden_layers=2, image_size=56"),
    hf("SwiftFormer", size="1x3x224x224"),
    hf("PvtV2", "image_size=64"),
    hf("Cvt", size="1x3x64x64"),
    monai(
        "UNet",
        "spatial_dims=2, in_channels=1, out_channels=3, channels=(8, 16, 32), strides=(2, 2), num_res_units=2",
        "1x1x32x32",
    ),
    monai(
        "DynUNet", "2, 1, 3, [3, 3, 3, 3], [1, 2, 2, 2], [2, 2, 2], deep_supervision=True, deep_supr_num=2", "1x1x64x64"
    ),
    monai("SegResNet", "spatial_dims=2, init_filters=8, in_channels=1, out_channels=3", "1x1x32x32"),
    monai("VNet", "spatial_dims=3", "1x1x32x32x32"),
    monai("AttentionUnet", "2, 1, 3, (8, 16, 32), (2, 2)", "1x1x32x32"),
    monai("BasicUNet", "spatial_dims=2, out_channels=3", "1x1x64x64"),
    monai("BasicUNetPlusPlus", "spatial_dims=2, out_channels=3", "1x1x64x64"),
    monai("DenseNet121", "spatial_dims=2, in_channels=1, out_channels=4", "1x1x64x64"),
    monai("SEResNet50", "spatial_dims=2, in_channels=1, num_classes=4", "1x1x64x64"),
    monai(
        "EfficientNetBN",
        "'efficientnet-b0', pretrained=False, spatial_dims=2, in_channels=1, num_classes=4",
        "1x1x64x64",
    ),
    monai("HighResNet", "spatial_dims=2, in_channels=1, out_channels=3", "1x1x32x32"),
    monai("Regressor", "in_shape=(1, 32, 32), out_shape=(4,), channels=(8, 16), strides=(2, 2)", "1x1x32x32"),
    monai("AutoEncoder", "2, 1, 1, (8, 16), (2, 2)", "1x1x32x32"),
    monai("resnet18", "spatial_dims=2, n_input_channels=1, num_classes=4", "1x1x64x64"),
    cv("shakeshakeresnet20_2x16d_cifar10", "1x3x32x32"),
    cv("igcv3_wd4"),
    cv("menet108_8x1_g3"),
    cv("ror3_56_cifar10", "1x3x32x32"),
    cv("sepreresnet20_cifar10", "1x3x32x32"),
    cv("mobilenet_wd4"),
    cv("shufflenetv2b_wd2"),
    cv("ghostnet"),
    cv("dla34"),
    cv("hrnet_w18_small_v1"),
    cv("sqnxt23_w1"),
    cv("pyramidnet110_a48_cifar10", "1x3x32x32"),
    cv("airnet50_1x64d_r2"),
    cv("bam_resnet18"),
    cv("cbam_resnet18"),
    cv("condensenet74_c8_g8"),
    cv("sparsenet121"),
    cv("drnd22"),
    cv("xdensenet40_2_k24_bc_cifar10", "1x3x32x32"),
    cv("proxylessnas_mobile"),
    cv("spnasnet"),
    cv("efficientnet_edge_small_b"),
    cv("bninception", "1x3x224x224"),
    cv("nin_cifar10", "1x3x32x32"),
    cv("resdropresnet20_cifar10", "1x3x32x32"),
    cv("diaresnet20_cifar10", "1x3x32x32"),
    cv("wrn16_10_cifar10", "1x3x32x32"),
    cv("selecsls42"),
    ("kornia", "HardNet", "from kornia.feature import HardNet", "HardNet(pretrained=False)", "2x1x32x32"),
    ("kornia", "SOSNet", "from kornia.feature import SOSNet", "SOSNet(pretrained=False)", "2x1x32x32"),
    ("kornia", "TFeat", "from kornia.feature import TFeat", "TFeat(pretrained=False)", "2x1x32x32"),
    ("kornia", "HyNet", "from kornia.feature import HyNet", "HyNet(pretrained=False)", "2x1x32x32"),
    ("kornia", "DexiNed", "from kornia.filters.dexined import DexiNed", "DexiNed(pretrained=False)", "1x3x64x64"),
    (
        "torchaudio",
        "Conv-TasNet",
        "from torchaudio.models import ConvTasNet",
        "ConvTasNet(num_sources=2, "
        "enc_num_feats=64, msk_num_feats=16, "
        "msk_num_hidden_feats=32, "
        "msk_num_layers=3, msk_num_stacks=2)",
        "1x1x4000",
    ),
    (
        "torchaudio",
        "Wav2Letter",
        "from torchaudio.models import Wav2Letter",
        "Wav2Letter(num_classes=10, input_type='mfcc', num_features=13)",
        "1x13x100",
    ),
    (
        "torchaudio",
        "DeepSpeech",
        "from torchaudio.models import DeepSpeech",
        "DeepSpeech(n_feature=16, n_hidden=64, n_class=10)",
        "1x1x20x16",
    ),
    (
        "torchaudio",
        "WaveRNN",
        "from torchaudio.models import WaveRNN",
        "WaveRNN([2, 4], 16, 8, n_res_block=2, n_rnn=32, n_fc=32, kernel_size=5, n_freq=16, n_hidden=16, n_output=16)",
        "(torch.rand(1, 1, 32), torch.rand(1, 1, 16, 8))",
    ),
    (
        "speechbrain",
        "ECAPA-TDNN",
        "from speechbrain.lobes.models.ECAPA_TDNN import ECAPA_TDNN",
        "ECAPA_TDNN(20, channels=[64, 64, 64, 64, 192], lin_neurons=32)",
        "1x50x20",
    ),
    (
        "speechbrain",
        "Xvector",
        "from speechbrain.lobes.models.Xvector import Xvector",
        "Xvector(in_channels=20, tdnn_channels=[64, 64, 64, 64, 128])",
        "1x50x20",
    ),
    (
        "speechbrain",
        "CRDNN",
        "from speechbrain.lobes.models.CRDNN import CRDNN",
        "CRDNN(input_shape=[1, 50, 20], cnn_channels=(16, 16), rnn_neurons=32, dnn_neurons=32)",
        "1x50x20",
    ),
    (
        "efficientnet-pytorch",
        "EfficientNet b0",
        "from efficientnet_pytorch import EfficientNet",
        "EfficientNet.from_name('efficientnet-b0')",
        "1x3x64x64",
    ),
    (
        "vit-pytorch",
        "MobileViT",
        "from vit_pytorch.mobile_vit import MobileViT",
        "MobileViT((64, 64), [24, 32, 40], [8, 8, 16, 16, 24, 24, 32, 32, 40, 40, 80], 10)",
        "1x3x64x64",
    ),
    (
        "vit-pytorch",
        "CvT",
        "from vit_pytorch.cvt import CvT",
        "CvT(num_classes=10, s1_emb_dim=16, s2_emb_dim=32, s3_emb_dim=48, s3_depth=2)",
        "1x3x64x64",
    ),
    (
        "diffusers",
        "UNet2D",
        "from diffusers import UNet2DModel",
        "UNet2DModel(sample_size=32, block_out_channels=(32, "
        "64), down_block_types=('DownBlock2D', "
        "'AttnDownBlock2D'), "
        "up_block_types=('AttnUpBlock2D', 'UpBlock2D'), "
        "layers_per_block=1)",
        "(torch.rand(1, 3, 32, 32), torch.tensor([3]))",
    ),
    (
        "diffusers",
        "AutoencoderKL",
        "from diffusers import AutoencoderKL",
        "AutoencoderKL(block_out_channels=(32, 64), "
        "down_block_types=('DownEncoderBlock2D',) * "
        "2, up_block_types=('UpDecoderBlock2D',) * "
        "2)",
        "1x3x32x32",
    ),
    (
        "braindecode",
        "EEGNet",
        "from braindecode.models import EEGNet",
        "EEGNet(n_chans=8, n_outputs=4, n_times=256)",
        "1x8x256",
    ),
    (
        "braindecode",
        "Deep4Net",
        "from braindecode.models import Deep4Net",
        "Deep4Net(n_chans=8, n_outputs=4, n_times=600)",
        "1x8x600",
    ),
    (
        "braindecode",
        "ShallowFBCSPNet",
        "from braindecode.models import ShallowFBCSPNet",
        "ShallowFBCSPNet(n_chans=8, n_outputs=4, n_times=256)",
        "1x8x256",
    ),
    ("torchxrayvision", "DenseNet", "import torchxrayvision.models as xrv", "xrv.DenseNet(num_classes=4)", "1x1x64x64"),
    (
        "pretrainedmodels",
        "se_resnext50_32x4d",
        "import pretrainedmodels",
        "pretrainedmodels.se_resnext50_32x4d(1000, pretrained=None)",
        "1x3x224x224",
    ),
    (
        "pretrainedmodels",
        "resnet18",
        "import pretrainedmodels",
        "pretrainedmodels.resnet18(1000, pretrained=None)",
        "1x3x224x224",
    ),
    (
        "pretrainedmodels",
        "xception",
        "import pretrainedmodels",
        "pretrainedmodels.xception(1000, pretrained=None)",
        "1x3x96x96",
    ),
    (
        "super-image",
        "EDSR",
        "from super_image import EdsrModel, EdsrConfig",
        "EdsrModel(EdsrConfig(scale=2, n_resblocks=4, n_feats=32))",
        "1x3x24x24",
    ),
    (
        "super-image",
        "CARN",
        "from super_image import CarnModel, CarnConfig",
        "CarnModel(CarnConfig(scale=2))",
        "1x3x24x24",
    ),
    (
        "facenet-pytorch",
        "InceptionResnetV1",
        "from facenet_pytorch import InceptionResnetV1",
        "InceptionResnetV1(classify=True, num_classes=10)",
        "1x3x96x96",
    ),
    (
        "dynamic-network-architectures",
        "PlainConvUNet",
        "from dynamic_network_architectures.architectures.unet import PlainConvUNet; from torch import nn",
        "PlainConvUNet(1, 3, (8, 16, 32), nn.Conv2d, 3, (1, 2, 2), (1, 1, 1), 3, (1, 1), True, nn.InstanceNorm2d, "
        "{'affine': True}, None, None, nn.LeakyReLU, {'inplace': True}, deep_supervision=True)",
        "1x1x32x32",
    ),
    (
        "dynamic-network-architectures",
        "ResidualEncoderUNet",
        "from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet; from torch import nn",
        "ResidualEncoderUNet(1, 3, (8, 16, 32), nn.Conv2d, 3, (1, 2, 2), (1, 1, 1), 3, (1, 1), True, "
        "nn.InstanceNorm2d, {'affine': True}, None, None, nn.LeakyReLU, {'inplace': True})",
        "1x1x32x32",
    ),
    (
        "open_clip",
        "RN50 image tower",
        "from open_clip.modified_resnet import ModifiedResNet",
        "ModifiedResNet((1, 1, 1, 1), 64, 4, image_size=64, width=16)",
        "1x3x64x64",
    ),
]


def state_of(model: torch.nn.Module, inputs: tuple) -> list:
    """Everything that tracing could change: tensors with their places, plain attributes, modes, hooks, generators,
    inputs."""
    values = [value for _, value in [*model.named_parameters(), *model.named_buffers(), *attribute_values(model)]]
    return [
        [(value.clone(), value.data_ptr()) if isinstance(value, Tensor) else repr(value) for value in values],
        [module.training for module in model.modules()],
        [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
        torch.get_rng_state(),
        [value.clone() for value in inputs if isinstance(value, Tensor)],
    ]


def same(one: object, other: object) -> bool:
    if isinstance(one, Tensor):
        return one.shape == other.shape and bool(((one == other) | ((one != one) & (other != other))).all())
    return len(one) == len(other) and all(map(same, one, other)) if isinstance(one, (list, tuple)) else one == other


def example(text: str) -> tuple:
    torch.manual_seed(0)
    # our own table above
    return eval(text, {"torch": torch}) if text.startswith("(") else (torch.rand(*map(int, text.split("x"))),)


def measure(package: str, name: str, imports: str, expression: str, inputs: str) -> dict:
    line = {"package": package, "network": name}
    space: dict = {"torch": torch}
    try:
        torch.manual_seed(0)
        exec(imports, space)
        model, x = eval(expression, space), example(inputs)
    except Exception as error:
        return {
            **line,
            "not_built": f"{type(error).__name__}: {str(error).splitlines()[0][:150] if str(error) else ''}",
        }
    before, started = state_of(model, x), time.perf_counter()
    try:
        graph = trace(model, x)
    except DynpruneError as error:
        return {**line, "refused": str(error)[:300], "untouched": same(before, state_of(model, x))}
    except Exception as error:
        return {
            **line,
            "failed": f"{type(error).__name__}: {str(error)[:200]}",
            "untouched": same(before, state_of(model, x)),
        }
    seconds = time.perf_counter() - started
    check = check_exactness(model, graph, x, 0.5, 0, seconds)
    return {
        **line,
        "params": graph.params({}),
        "prunable": prunable_share(graph),
        "groups": len(graph),
        "mixed": len(check.mixed),
        "ok": check.ok,
        "diff": check.max_rel_diff,
        "effect": check.effect,
        "failure": check.failure,
        "not_shown": check.not_shown,
        "kept": check.params_kept_share,
        "trace_s": seconds,
        "untouched": same(before, state_of(model, x)),
        "pins": sorted({pin.op for pin in graph.pinned} - {"output"}),
    }


def table(lines: list[dict]) -> str:
    rows = [
        "| package | network | parameters | prunable | groups (mixed) | largest difference | effect of removal | "
        "state | trace | pinned by |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for line in lines:
        if "params" not in line:
            rows.append(
                f"| {line['package']} | {line['network']} | "
                f"{line.get('refused') or line.get('failed') or line.get('not_built')} | | | | | "
                f"{'untouched' if line.get('untouched') else ''} | | |"
            )
            continue
        verdict = (
            f"{line['diff']:.0e}"
            if line["ok"]
            else f"not shown: {line['not_shown']}"
            if line["not_shown"]
            else f"**FAILED** {line['failure']}"
        )
        rows.append(
            f"| {line['package']} | {line['network']} | {line['params'] / 1e6:.1f} M | "
            f"{100 * line['prunable']:.0f} % | {line['groups']} ({line['mixed']}) | {verdict} | "
            f"{line['effect']:.0e} | {'untouched' if line['untouched'] else '**changed**'} | "
            f"{line['trace_s']:.1f} s | {', '.join(line['pins']) or '-'} |"
        )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", default="run", choices=("run", "table"))
    parser.add_argument("--only", default="", help="only networks with this in package or name")
    parser.add_argument("--out")
    options = parser.parse_args()
    if options.what == "table":
        print(table([json.loads(line) for line in open(options.out)]))
        return
    warnings.filterwarnings("ignore")
    out = open(options.out, "a") if options.out else sys.stdout
    for entry in NETWORKS:
        if options.only.lower() in f"{entry[0]} {entry[1]}".lower():
            print(json.dumps(measure(*entry)), file=out, flush=True)
            gc.collect()


if __name__ == "__main__":
    main()
