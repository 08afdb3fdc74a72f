"""A reward of one's own: how positive an answer sounds, by the word list of vaderSentiment.

deepspeed --num_gpus 1 step3_ppo/main.py --reward docs/examples/sentiment.py:sentiment ...
"""

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

_analyzer = SentimentIntensityAnalyzer()


def sentiment(responses: list[str]) -> list[float]:
    """The compound score of each answer, from -1 (most negative) to 1 (most positive)."""
    return [_analyzer.polarity_scores(response)["compound"] for response in responses]
