"""outrider-nano, the default model: from package downloads to weights and model card in one
command.
"""
