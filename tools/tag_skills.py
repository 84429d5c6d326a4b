"""Prompts with the skills that they take: `megatron-oreal tag-skills`, without an installed package."""

from megatron_oreal.commands.tag_skills import main

if __name__ == "__main__":
    main()
