"""Nine networks of torchvision, transformers and torch_geometric, from doctor to trained.

pip install torch==2.14.1 torchvision==0.29.1 transformers==5.24.0 torch_geometric==2.8.1
"""

import sys
import warnings

import torch
import torch_geometric.nn as geometric
import torchvision.models as vision
import transformers as hub

import twophase_ext as tp

warnings.simplefilter("ignore")
N, CLASSES = 24, 3
IMAGES, LABELS = torch.rand(N, 3, 64, 64), torch.arange(N) % CLASSES
IDS = torch.randint(5, 100, (N, 12))
TEXT = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_labels": CLASSES}
WORDS = {**SMALL, "vocab_size": 100, "intermediate_size": 64, "pad_token_id": 0}


def of_torchvision(name, x=IMAGES, **settings):
    """A model of torchvision, and its inputs."""
    return getattr(vision, name)(weights=None, num_classes=CLASSES, **settings), x


def of_transformers(name, kind, x, **settings):
    """A classifier of transformers, and its inputs."""
    config = getattr(hub, f"{name}Config")(**settings)
    return getattr(hub, f"{name}For{kind}Classification")(config), x


def of_graph(kind):
    """A network over the nodes of a graph, and the nodes."""
    nodes, edges = torch.randn(N, 8), torch.randint(0, N, (2, 80))
    rows = tp.nn.Rows(kind(8, 16, 2, out_channels=16), nodes, edges)  # a node is a sample
    return torch.nn.Sequential(rows, torch.nn.Linear(16, CLASSES)), torch.arange(N)


NETWORKS = {
    "ResNet-50": lambda: of_torchvision("resnet50"),
    "ViT-B/16": lambda: of_torchvision("vit_b_16", IMAGES[..., :32, :32], image_size=32),
    "ConvNeXt-T": lambda: of_torchvision("convnext_tiny"),
    "Swin-T": lambda: of_torchvision("swin_t"),
    "BERT": lambda: of_transformers("Bert", "Sequence", TEXT, **WORDS),
    "Llama": lambda: of_transformers("Llama", "Sequence", TEXT, **WORDS, num_key_value_heads=2),
    "ViT": lambda: of_transformers("ViT", "Image", IMAGES, **SMALL, image_size=64, patch_size=8),
    "GCN": lambda: of_graph(geometric.GCN),
    "GIN": lambda: of_graph(geometric.GIN),
}

for name in sys.argv[1:] or NETWORKS:
    torch.manual_seed(0)
    model, x = NETWORKS[name]()
    report = tp.nn.analytic(model.eval(), example_input=x)
    tp.nn.widen(model, N, example_input=x)
    table = tp.check_assumptions(model, x)
    verdict = tp.verify_expressivity(model, x, w="witness")
    trainer = tp.Trainer(model, epochs=4, tau=0.5, batch_size=8, run_dir=False, progress=False)
    result = trainer.fit((x, LABELS))
    print(
        f"{name}: analytic {report.is_analytic}, premises hold {table.hold}, {verdict.status} in "
        f"{verdict.seconds:.0f} s, trained to {result.final['train_loss']:.3f}",
        flush=True,
    )
