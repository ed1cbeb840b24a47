"""The bridge to PEFT: its methods (`peft:<Class>`), their layers in a model, folders and dense updates."""
