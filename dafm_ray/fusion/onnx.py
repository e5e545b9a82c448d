"""A trained fusion as an ONNX graph, for servers without torch.

Inputs, float32: `scores` (candidates, models), raw; where the fusion has them `hubs` (candidates,
models), `Bank.without` transposed, `profiles` (candidates, models), the correlations of
`Profiles.similarities`, and `references` (candidates, R), cosines. Output: `fused` (candidates,).
Candidates that shall not be ranked are left out before, the reference among them where the protocol
masks it.
"""

import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from dafm_ray.errors import ConfigError, MachineError
from dafm_ray.files import replacing
from dafm_ray.fusion.artefact import Artefact

NORMALISATIONS = ("zscore", "none")


class Graph(nn.Module):
    """Normalisation, networks and their mean, as in `Learned`."""

    def __init__(self, artefact: Artefact) -> None:
        super().__init__()
        self.networks = nn.ModuleList(artefact.new_networks)
        self.channels = artefact.about.channels

    @property
    def inputs(self) -> dict[str, int]:
        """Name -> columns."""
        models = len(self.channels.models)
        named = {"scores": models}
        if self.channels.hubs:
            named["hubs"] = models
        if self.channels.profiles:
            named["profiles"] = models
        if self.channels.references:
            named["references"] = len(self.channels.references)
        return named

    def forward(self, scores_NM: Tensor, *extras: Tensor) -> Tensor:
        """(N, M) and extras in the order of `inputs` -> (N,)."""
        zscored = self.channels.normalisation == "zscore"
        parts = [_zscore(scores_NM) if zscored else scores_NM]
        for name, values in zip(list(self.inputs)[1:], extras, strict=True):
            parts.append(values if name == "hubs" else _zscore(values))
        channels_1NK = torch.cat(parts, dim=-1)[None]
        each = [network(channels_1NK)[0] for network in self.networks]
        return torch.stack(each).mean(0)


def _zscore(values_NM: Tensor) -> Tensor:
    centred = values_NM - values_NM.mean(0, keepdim=True)
    deviation = centred.square().mean(0, keepdim=True).sqrt()
    return centred / deviation.clamp(min=1e-12)


def export_onnx(artefact: Artefact, file: Path) -> None:
    """Write the graph.

    Args:
        artefact: one with a filter, a gate, or another normalisation than `zscore` and `none`
            cannot be exported.
        file: the ONNX file.

    Raises:
        ConfigError: such a fusion.
        MachineError: the packages of the extra `onnx` are not installed, or the file cannot be
            written.
    """
    about = artefact.about
    if about.normalisation not in NORMALISATIONS:
        raise ConfigError(f"normalisation {about.normalisation} cannot be exported to ONNX")
    if about.network.kernel > 1 or about.network.gate:
        raise ConfigError("a fusion with a filter or a gate cannot be exported to ONNX")
    graph = Graph(artefact).eval()
    example = tuple(torch.randn(50, columns) for columns in graph.inputs.values())
    candidates = torch.export.Dim("candidates", min=2)
    shapes = ({0: candidates}, tuple({0: candidates} for _ in example[1:]))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporter, about itself
            program = torch.onnx.export(
                graph,
                example,
                input_names=list(graph.inputs),
                output_names=["fused"],
                dynamic_shapes=shapes,
                dynamo=True,
                verbose=False,
            )
    except ImportError:
        raise MachineError("exporting needs more packages: pip install 'dafm-ray[onnx]'") from None
    assert program is not None
    with replacing(file) as temporary:
        program.save(str(temporary))
