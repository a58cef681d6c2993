"""Token mixers. To add one: a file here with a `Mixer` subclass, and a line in `MIXERS`."""

from searchspace.mixers.aft import AftFull
from searchspace.mixers.aft_window import AftConv, AftLocal
from searchspace.mixers.base import Mixer
from searchspace.mixers.cosine_linear import CosineAttention
from searchspace.mixers.deltanet import DeltaNet
from searchspace.mixers.diag_block import BlockAttention
from searchspace.mixers.dilated import DilatedAttention
from searchspace.mixers.dsconv import SeparableConv
from searchspace.mixers.dynamic_conv import DynamicConv
from searchspace.mixers.flow import FlowAttention
from searchspace.mixers.fourier import CosineMixer, FourierMixer
from searchspace.mixers.fourier_sf import FourierAttention
from searchspace.mixers.galerkin import GalerkinAttention
from searchspace.mixers.gla import GatedLinearAttention
from searchspace.mixers.glu_mixer import GluMixer
from searchspace.mixers.hedgehog import HedgehogAttention
from searchspace.mixers.hyena import Hyena
from searchspace.mixers.latte import LatteAttention
from searchspace.mixers.linear_elu import LinearAttention
from searchspace.mixers.linformer import LinformerAttention
from searchspace.mixers.mamba import Mamba
from searchspace.mixers.mingru import MinGRU, MinLSTM
from searchspace.mixers.norm_attention import NormAttention
from searchspace.mixers.norm_linear import NormLinearAttention
from searchspace.mixers.pool import AveragePool, MaxPool
from searchspace.mixers.qrnn import QRNN
from searchspace.mixers.relu_attention import ReluAttention
from searchspace.mixers.retention import Retention
from searchspace.mixers.rwkv import RWKVTimeMix
from searchspace.mixers.slab_linear import SlabAttention
from searchspace.mixers.sliding_window import SlidingWindowAttention
from searchspace.mixers.softmax import SoftmaxAttention
from searchspace.mixers.sparse import FixedAttention, StridedAttention

MIXERS: dict[str, type[Mixer]] = {
    "softmax": SoftmaxAttention,
    "sliding_window": SlidingWindowAttention,
    "strided": StridedAttention,
    "fixed": FixedAttention,
    "dilated": DilatedAttention,
    "diag_block": BlockAttention,
    "relu_attention": ReluAttention,
    "norm_attention": NormAttention,
    "linformer": LinformerAttention,
    "linear_elu": LinearAttention,
    "hedgehog": HedgehogAttention,
    "cosine": CosineAttention,
    "norm_linear": NormLinearAttention,
    "flow": FlowAttention,
    "latte": LatteAttention,
    "slab": SlabAttention,
    "galerkin": GalerkinAttention,
    "fourier_sf": FourierAttention,
    "gla": GatedLinearAttention,
    "retention": Retention,
    "deltanet": DeltaNet,
    "mamba": Mamba,
    "rwkv_timemix": RWKVTimeMix,
    "mingru": MinGRU,
    "minlstm": MinLSTM,
    "qrnn": QRNN,
    "hyena": Hyena,
    "aft_full": AftFull,
    "aft_local": AftLocal,
    "aft_conv": AftConv,
    "pool": AveragePool,
    "maxpool": MaxPool,
    "dsconv": SeparableConv,
    "dynamic_conv": DynamicConv,
    "glu_mixer": GluMixer,
    "fourier": FourierMixer,
    "dct": CosineMixer,
}
"""Every mixer by name; `"none"` stands for a slot without one."""

__all__ = ["MIXERS", "Mixer"]
