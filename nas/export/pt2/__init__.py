"""Programs of torch.export."""

from nas.export.pt2.exporter import ProgramExporter

__all__ = ["ProgramExporter"]
