"""Pallas kernels, imported as `flaxcompress.kernels` and reached only through `flaxcompress.ops`."""
