"""The scenarios of ``wasi-nn bench``: how the measuring modules' figures become rows, targets and plots."""
