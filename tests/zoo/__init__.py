"""The zoo: small models of many architectures, each under many conditions, held against a loop over single samples.

`entry.py` says what a model and its batch are, `conditions.py` what is done to them, `truth.py` what is right,
`ours.py` what this library says, `registry.py` lists the models. `benchmarks/peers/zoo.py` asks the peers the same.
"""
