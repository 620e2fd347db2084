"""fastinfer inside other people's code. Nothing here runs, or imports anything, until it is called.

fastinfer.integrations.transformers.enable()  # attn_implementation="fastinfer"
fastinfer.integrations.flash_attn.install()  # `import flash_attn` finds fastinfer
"""
