"""`python -m quantlab bench`: QuantLab's speed against llama.cpp, transformers and the machine.

    spec      what to measure
    subjects  the models, packed for QuantLab and as GGUF files
    sides     engines that read tokens and are timed
    contest   sides in turn, again and again, in one run
    linears   products against the machine's bandwidth and peak
    run       all of it, as the JSON document

Absolute figures drift with the machine and its other work; what counts is a ratio of medians taken
in turn. Nothing else in QuantLab imports this room.
"""
