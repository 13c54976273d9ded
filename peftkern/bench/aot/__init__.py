"""What the Triton kernels are compiled to, found without a GPU: registers, spills, loads, tensor-core instructions.

``sass`` reads machine code, ``compile`` makes it, ``resources`` keeps the checked-in table, ``cases`` are the
benchmarks. ``python -m peftkern.bench.aot`` compares the kernels with the table, ``--update`` writes it anew.
"""
