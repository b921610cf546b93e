"""Topics of documents: planted topics are found again, and judged by perplexity and coherence.

python examples/topic_model.py --epochs 200
"""

import torch
import tyro

from ppvae import fit, log_marginal, nn, posteriors, priors
from ppvae.evaluation import coherence, perplexity
from ppvae.models import TopicModel

WORDS, TOPICS = 25, 5


def corpus(documents: int, seed: int) -> torch.Tensor:
    """Bags of 60 words [documents, 25]; topic t is words 5 t .. 5 t + 4, and documents mix two topics or so."""
    torch.manual_seed(seed)
    topics = torch.eye(TOPICS).repeat_interleave(WORDS // TOPICS, -1) / (WORDS // TOPICS)
    shares = torch.distributions.Dirichlet(torch.full((TOPICS,), 0.3)).sample((documents,))
    return torch.distributions.Multinomial(60, shares @ topics).sample()


def main(epochs: int = 200, documents: int = 1000, hidden: int = 64, seed: int = 0) -> float:
    """Returns the perplexity of test documents; a model without topics has 25."""
    train, test = corpus(documents, seed), corpus(100, seed + 1)
    torch.manual_seed(seed)
    model = TopicModel(
        priors.LogisticNormal(TOPICS),
        nn.Topics(TOPICS, WORDS),
        posteriors.LogisticNormal(torch.nn.Sequential(nn.Log1p(), nn.mlp(WORDS, 2 * TOPICS, hidden=(hidden,)))),
    )
    run = fit(model.model, model.guide, train, epochs=epochs, batch_size=100, seed=seed)
    est = log_marginal(run.model, run.guide, test, num_particles=500, proposal="refined", seed=seed)
    for row in model.words.detach():
        print("topic:", " ".join(f"{int(word):2d}" for word in row.topk(5).indices.sort().values))
    found = perplexity(est.log_px, test)
    print(f"perplexity {found:.2f}, coherence {coherence(model.words.detach(), test, top=5).mean():.2f}")
    return found


if __name__ == "__main__":
    tyro.cli(main)
