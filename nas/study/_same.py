"""Whether what a study holds can be put together with what a run is about to evaluate."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from optuna.study import Study

from nas.study.storage import without_password
from searchspace.errors import UserError

SPACE = "space"
WEIGHTS = "weights"
ANOTHER = "give another --out, or another name as in --storage URL#NAME"


def check_same(studies: Iterable[Study], url: str, space: str, weights: str) -> None:
    """Refuse studies of another space or of other weights; what is empty is not compared.

    Raises:
        UserError: saying which study, and what to do.
    """
    for study in studies:
        where = f"the study {study.study_name!r} at {without_password(url)}"
        attrs = study.user_attrs
        if _differs(attrs, SPACE, space):
            raise UserError(
                f"{where} holds archs of space {attrs[SPACE]!r}, and this run searches {space!r}; "
                f"{ANOTHER}"
            )
        if _differs(attrs, WEIGHTS, weights):
            raise UserError(
                f"{where} holds losses of another supernet than this run's, which do not compare; "
                f"{ANOTHER}, or move that study away"
            )


def remember(study: Study, space: str, weights: str) -> None:
    """Write down what a study is of, where that is known and not written yet."""
    for key, value in ((SPACE, space), (WEIGHTS, weights)):
        if value and key not in study.user_attrs:
            study.set_user_attr(key, value)


def _differs(attrs: Mapping[str, str], key: str, value: str) -> bool:
    stored = attrs.get(key, "")
    return bool(stored and value and stored != value)
