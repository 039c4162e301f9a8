"""One typed configuration and one command line for both backends."""

from shared.config.command_line import parse_command_line, read_configuration
from shared.config.options import Backend, TrainConfig
from shared.config.support import notices
from shared.config.validation import validate
from shared.config.yaml_io import to_yaml

__all__ = ["Backend", "TrainConfig", "notices", "parse_command_line", "read_configuration", "to_yaml", "validate"]
