"""The LightningModule, its metrics, strategies and checks."""
