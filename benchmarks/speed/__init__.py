"""The speed benchmarks: ``python -m benchmarks {gemm,quant,attention,block,model,compile,memory}``.

One command is one table or more: rows of our path beside rows of peers, on the same inputs, in one
process, timed in turn so that a drift of the clock falls on all of them. A row carries its
accuracy; the bars it must clear are in :mod:`benchmarks.speed.bars`.
"""
