"""Prompt sets: read them, render them with a template, and turn them into token ids."""

from tdistill.prompts.identity import (
    check_same_tokenizer,
    check_vocabulary,
    end_token_ids,
    num_token_ids,
    tokenizer_sha256,
)
from tdistill.prompts.overlap import count_shared
from tdistill.prompts.read import Record, is_file, read_records, read_texts, resolve_package_path
from tdistill.prompts.references import references_by_id
from tdistill.prompts.templates import Template, TemplateKind, choose_template
from tdistill.prompts.tokenise import tokenize_prompts, tokenize_texts

__all__ = [
    "Record",
    "Template",
    "TemplateKind",
    "check_same_tokenizer",
    "check_vocabulary",
    "choose_template",
    "count_shared",
    "end_token_ids",
    "is_file",
    "num_token_ids",
    "read_records",
    "read_texts",
    "references_by_id",
    "resolve_package_path",
    "tokenize_prompts",
    "tokenize_texts",
    "tokenizer_sha256",
]
