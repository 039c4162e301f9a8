"""One typed configuration and one command line for both backends."""

from shared.config.command_line import configuration_of, parse_command_line
from shared.config.options import Backend, TrainConfig
from shared.config.support import notices
from shared.config.validation import validate
from shared.config.yaml_io import to_yaml

__all__ = ["Backend", "TrainConfig", "configuration_of", "notices", "parse_command_line", "to_yaml", "validate"]
