"""Building blocks of networks, one kind a file: import the file, as in
``from pointcanon.layers import vector_neurons as vn``.
"""
