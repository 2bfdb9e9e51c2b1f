"""Structured output: texts that a JSON schema, a regular expression or a grammar allows. By llguidance."""

from gptjax.structured.grammar import Grammar as Grammar
