"""A callback: it halves the learning rate every ten epochs and says so in the run's log."""

import torch

import twophase_ext as tp


class HalveEveryTen(tp.Callback):
    """Halves the base algorithm's learning rate after epochs 9, 19, ..."""

    def on_epoch_end(self, run, record):
        """After an epoch, before the checkpoint."""
        if record["epoch"] % 10 == 9:
            for group in run.optimizer.param_groups:
                group["lr"] /= 2
            run.say(f"epoch {record['epoch']}: loss {record['train_loss']:.4f}, rate halved")


def main(epochs: int = 20) -> tp.Result:
    """Train a small network on random labels."""
    torch.manual_seed(0)
    x, y = torch.randn(200, 5), torch.randint(3, (200,))
    model = torch.nn.Sequential(torch.nn.Linear(5, 220), tp.nn.Softplus(), torch.nn.Linear(220, 3))
    trainer = tp.Trainer(model, epochs=epochs, tau=0.5, callbacks=[HalveEveryTen()], run_dir=False)
    return trainer.fit((x, y))


if __name__ == "__main__":
    print(main())
