"""The methods: each knows its formulas, none knows a backend."""
