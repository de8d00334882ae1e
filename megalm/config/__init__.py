"""The configuration of a run: defaults < recipes (YAML) < flags, cross-checked with the DeepSpeed JSON.

Where to add
* a setting: a field with its help text in a section (model.py, training.py, data.py, parallel.py, output.py); the
  flag, recipe key, dump and reference follow.
* a section: its class in sections.py.
* a peer's other name for a setting, a flag that is not supported: the tables in merging/names.py; a flag without
  effect: merging/nothing.py.
* a length (a run's, a schedule's): lengths.py, which turns every unit into samples; its rules in rules/schedule.py.
* another trainer's configuration: a file in translation/.
* a rule between settings: a function in rules/run.py, and its name in `CHECKS`; of the layout: rules/layout.py.
* a key of DeepSpeed's JSON: its type in deepspeed/vocabulary.py, what is done about it in deepspeed/answers.py; one
  that says what a setting says: `deepspeed.read.FACTS`.
* what DeepSpeed is given: deepspeed/write.py.
"""
