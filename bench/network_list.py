"""The networks of networks.py, family by family: small inputs, random weights."""

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import twophase_ext as tp

N, CLASSES = 24, 3
Made = tuple[nn.Module, Any]


def images(size: int = 64, channels: int = 3) -> Tensor:
    """N random images."""
    return torch.rand(N, channels, size, size)


def tokens(length: int = 12, vocabulary: int = 100) -> Tensor:
    """N random sequences."""
    return torch.randint(5, vocabulary, (N, length))


def torchvision_networks() -> Iterator[tuple[str, Callable[[], Made]]]:
    """One of each kind, at its own width."""
    import torchvision.models as zoo

    sizes = {"vit_b_16": 32, "inception_v3": 96}
    settings: dict[str, dict[str, Any]] = {
        "vit_b_16": {"image_size": 32},
        "inception_v3": {"aux_logits": False, "init_weights": False},
        "googlenet": {"aux_logits": False, "init_weights": False},
    }
    names = (
        "alexnet vgg11 vgg11_bn squeezenet1_1 resnet18 resnet50 resnext50_32x4d wide_resnet50_2 "
        "densenet121 googlenet inception_v3 shufflenet_v2_x0_5 mobilenet_v2 mobilenet_v3_small "
        "mnasnet0_5 efficientnet_b0 efficientnet_v2_s regnet_y_400mf regnet_x_400mf convnext_tiny "
        "vit_b_16 swin_t swin_v2_t"
    )
    for name in names.split():
        make = getattr(zoo, name)
        yield (
            name,
            lambda make=make, name=name: (
                make(weights=None, num_classes=CLASSES, **settings.get(name, {})),
                images(sizes.get(name, 64)),
            ),
        )


def timm_networks() -> Iterator[tuple[str, Callable[[], Made]]]:
    """One small network of many of its files."""
    import timm

    names = (
        "resnet10t resnetv2_50 densenet121 mobilenetv3_small_050 ghostnet_050 lcnet_050 "
        "efficientnet_lite0 mixnet_s hardcorenas_a rexnet_100 tinynet_e regnetx_002 "
        "convnext_atto convnextv2_atto convmixer_768_32 mixer_s32_224 resmlp_12_224 gmlp_ti16_224 "
        "poolformer_s12 vit_tiny_patch16_224 deit_tiny_patch16_224 beit_base_patch16_224 "
        "cait_xxs24_224 xcit_nano_12_p16_224 levit_128s pit_ti_224 crossvit_tiny_240 "
        "swin_tiny_patch4_window7_224 coat_tiny twins_svt_small visformer_tiny edgenext_xx_small "
        "mobilevit_xxs efficientformer_l1 fastvit_t8 repvgg_a0 inception_next_atto"
    )
    fixed = {"mixer", "resmlp", "gmlp", "vit", "deit", "beit", "cait", "levit", "pit", "swin"}
    fixed |= {"xcit", "coat", "twins", "visformer", "efficientformer", "mobilevit"}
    for name in names.split():
        size = 240 if "crossvit" in name else 224 if name.split("_")[0] in fixed else 64
        count = 8 if size > 64 else N
        yield (
            name,
            lambda name=name, size=size, count=count: (
                timm.create_model(name, pretrained=False, num_classes=CLASSES),
                images(size)[:count],
            ),
        )


def transformers_networks() -> Iterator[tuple[str, Callable[[], Made]]]:
    """Small configurations of classifiers; text as dicts of ids and masks."""
    import transformers as hub

    small = {
        "vocab_size": 100,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
        "num_labels": CLASSES,
        "pad_token_id": 0,
    }
    text = (
        "Bert Roberta Electra Albert DistilBert MPNet DebertaV2 ConvBert RoFormer ModernBert "
        "XLMRoberta Ernie GPT2 OPT GPTNeo GPTNeoX Bloom Llama Mistral Qwen2 Qwen3 Gemma Phi Falcon"
    )
    extra: dict[str, dict[str, Any]] = {
        "DistilBert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64},
        "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
        "GPTNeo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global"], 2]]},
        "OPT": {"ffn_dim": 64, "word_embed_proj_dim": 32},
        "Bloom": {"n_layer": 2, "n_head": 4},
        "Albert": {"embedding_size": 16},
        "Electra": {"embedding_size": 16},
        "Llama": {"num_key_value_heads": 2},
        "Mistral": {"num_key_value_heads": 2},
        "Qwen2": {"num_key_value_heads": 2},
        "Qwen3": {"num_key_value_heads": 2, "head_dim": 8},
        "Gemma": {"num_key_value_heads": 2, "head_dim": 8},
        "Roberta": {"max_position_embeddings": 66, "pad_token_id": 1},
        "XLMRoberta": {"max_position_embeddings": 66, "pad_token_id": 1},
        "ModernBert": {"cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2},
    }
    for name in text.split():

        def make(name: str = name) -> Made:
            config = getattr(hub, f"{name}Config")(**{**small, **extra.get(name, {})})
            ids = tokens()
            given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            return getattr(hub, f"{name}ForSequenceClassification")(config), given

        yield name, make
    # an output for every token; language models are tied to their embedding
    for name, kind in (
        *(("Bert", "ForTokenClassification"), ("Bert", "ForMaskedLM"), ("GPT2", "LMHeadModel")),
        *(("Llama", "ForCausalLM"), ("Qwen3", "ForCausalLM"), ("ModernBert", "ForMaskedLM")),
    ):

        def per_token(name: str = name, kind: str = kind) -> Made:
            config = getattr(hub, f"{name}Config")(**{**small, **extra.get(name, {})})
            ids = tokens(8)
            ids[:, 0] = torch.arange(N) + 5  # equal prefixes are one input of a causal model
            given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            return getattr(hub, f"{name}{kind}")(config), given

        yield f"{name}{kind}", per_token
    picture = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "image_size": 32,
        "patch_size": 8,
        "num_labels": CLASSES,
    }
    for name in ("ViT", "DeiT", "Beit", "Dinov2", "ConvNext", "ResNet", "Swin", "MobileViT"):

        def show(name: str = name) -> Made:
            own: dict[str, Any] = picture
            if name in ("ConvNext", "ResNet"):
                own = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_labels": CLASSES}
                own["num_stages"] = 2
                if name == "ResNet":
                    own |= {"embedding_size": 8, "layer_type": "basic"}
                    del own["num_stages"]
            if name == "Swin":
                own = {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4}
                own |= {"image_size": 32, "patch_size": 2, "num_labels": CLASSES}
            if name == "MobileViT":
                own = {"num_labels": CLASSES}
            config = getattr(hub, f"{name}Config")(**own)
            return getattr(hub, f"{name}ForImageClassification")(config), images(32)

        yield name, show


def geometric_networks() -> Iterator[tuple[str, Callable[[], Made]]]:
    """Nodes of one graph as samples: a backbone of torch_geometric and an affine layer."""
    import torch_geometric.nn as pyg

    x = torch.randn(N, 8)
    edges = torch.randint(0, N, (2, 90))
    convolutions: dict[str, Callable[[int, int], nn.Module]] = {
        "GCNConv": pyg.GCNConv,
        "SAGEConv": pyg.SAGEConv,
        "GATConv": pyg.GATConv,
        "GATv2Conv": pyg.GATv2Conv,
        "GraphConv": pyg.GraphConv,
        "TransformerConv": pyg.TransformerConv,
        "TAGConv": pyg.TAGConv,
        "SGConv": pyg.SGConv,
        "ChebConv": lambda i, o: pyg.ChebConv(i, o, 2),
        "ARMAConv": pyg.ARMAConv,
        "LEConv": pyg.LEConv,
        "ClusterGCNConv": pyg.ClusterGCNConv,
        "GINConv": lambda i, o: pyg.GINConv(nn.Sequential(nn.Linear(i, o), nn.ReLU())),
        "GeneralConv": pyg.GeneralConv,
        "ResGatedGraphConv": pyg.ResGatedGraphConv,
        "FeaStConv": pyg.FeaStConv,
    }

    class Two(nn.Module):
        def __init__(self, make: Callable[[int, int], nn.Module]) -> None:
            super().__init__()
            self.first, self.second = make(8, 16), make(16, 16)

        def forward(self, x: Tensor, edges: Tensor) -> Tensor:
            return self.second(self.first(x, edges).relu(), edges).relu()

    def over(backbone: nn.Module) -> Made:
        rows = tp.nn.Rows(backbone, x, edges)
        return nn.Sequential(rows, nn.Linear(16, CLASSES)), torch.arange(N)

    for name, make in convolutions.items():
        yield name, lambda make=make: over(Two(make))
    for name in ("GCN", "GIN", "GAT", "GraphSAGE", "PNA", "EdgeCNN"):

        def whole(name: str = name) -> Made:
            settings: dict[str, Any] = {}
            if name == "PNA":
                settings = {"aggregators": ["mean", "sum"], "scalers": ["identity"]}
                settings["deg"] = torch.bincount(edges[1], minlength=N).bincount()
            return over(getattr(pyg, name)(8, 16, 2, out_channels=16, **settings))

        yield name, whole


def vit_pytorch_networks() -> Iterator[tuple[str, Callable[[], Made]]]:
    """Small configurations of the package's vision transformers."""
    common = {"dim": 32, "depth": 2, "heads": 4, "mlp_dim": 64, "num_classes": CLASSES}
    sizes = {"image_size": 32, "patch_size": 8}
    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "vit": ("ViT", {}),
        "simple_vit": ("SimpleViT", {}),
        "simple_vit_with_register_tokens": ("SimpleViT", {}),
        "simple_vit_with_patch_dropout": ("SimpleViT", {"patch_dropout": 0.1}),
        "deepvit": ("DeepViT", {}),
        "cait": ("CaiT", {"cls_depth": 1}),
        "parallel_vit": ("ViT", {"num_parallel_branches": 2}),
        "vit_for_small_dataset": ("ViT", {}),
        "normalized_vit": ("nViT", {}),
        "simple_flash_attn_vit": ("SimpleViT", {"use_flash": False}),
        "learnable_memory_vit": ("ViT", {}),
    }
    for name, (kind, more) in kinds.items():

        def make(name: str = name, kind: str = kind, more: dict[str, Any] = more) -> Made:
            module = importlib.import_module(f"vit_pytorch.{name}")  # noqa: TID251  of kinds
            return getattr(module, kind)(**{**common, **sizes, **more}), images(32)

        yield name, make


def torch_networks() -> Iterator[tuple[str, Callable[[], Made]]]:
    """torch's own recurrent and transformer layers over tokens."""

    class Over(nn.Module):
        def __init__(self, layer: nn.Module, width: int) -> None:
            super().__init__()
            self.table, self.layer = nn.Embedding(100, 16), layer
            self.head = nn.Linear(width, CLASSES)

        def forward(self, ids: Tensor) -> Tensor:
            h = self.layer(self.table(ids))
            h = h[0] if isinstance(h, tuple) else h
            return self.head(h[:, -1])

    layers: dict[str, Callable[[], tuple[nn.Module, int]]] = {
        "RNN": lambda: (nn.RNN(16, 24, 2, batch_first=True), 24),
        "LSTM": lambda: (nn.LSTM(16, 24, batch_first=True, bidirectional=True), 48),
        "GRU": lambda: (nn.GRU(16, 24, batch_first=True), 24),
        "TransformerEncoder": lambda: (
            nn.TransformerEncoder(
                nn.TransformerEncoderLayer(16, 4, 32, batch_first=True),
                2,
                enable_nested_tensor=False,
            ),
            16,
        ),
    }
    for name, make in layers.items():
        yield name, lambda make=make: (Over(*make()), tokens())

    class UNet(nn.Module):
        """An output for every pixel, by a 1 x 1 convolution."""

        def __init__(self) -> None:
            super().__init__()
            self.down = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
            self.inner = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU())
            self.up = nn.ConvTranspose2d(16, 8, 2, 2)
            self.head = nn.Conv2d(16, CLASSES, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.down(x)
            low = self.inner(nn.functional.max_pool2d(x, 2))
            return self.head(torch.cat([x, self.up(low)], 1))

    yield "UNet", lambda: (UNet(), images(8))


FAMILIES = {
    "torch": torch_networks,
    "torchvision": torchvision_networks,
    "timm": timm_networks,
    "transformers": transformers_networks,
    "torch_geometric": geometric_networks,
    "vit_pytorch": vit_pytorch_networks,
}
