"""Stands in for vLLM's loggers, which say a thing once where they are asked to."""

import logging

lines = []


def init_logger(name):
    logger = logging.getLogger(name)

    def once(level):
        def say(message, *args):
            if (level, message % args) not in lines:
                lines.append((level, message % args))

        return say

    logger.info_once, logger.warning_once = once("info"), once("warning")
    logger.warning = once("warning")
    return logger
