"""As in torch-npu, nothing but modules."""
