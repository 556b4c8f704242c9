"""The walkthroughs of the Learn tab, one file each, in the order in which they stand there."""

from quantlab.ui.lessons import (
    codebooks,
    columns,
    formats,
    matrix,
    outlier,
    quiz,
    salience,
    smoothing,
    superblock,
    training,
)
from quantlab.ui.lessons.base import Lesson

LESSONS: dict[str, Lesson] = {
    module.LESSON.name: module.LESSON
    for module in (
        formats,
        matrix,
        outlier,
        smoothing,
        columns,
        salience,
        codebooks,
        superblock,
        training,
        quiz,
    )
}
