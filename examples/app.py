# /// script
# requires-python = ">=3.10"
# dependencies = ["llm2clip-hf[train,eval,app]"]
# ///
# SPDX-License-Identifier: Apache-2.0
r"""
A search page for your own images: sentence to images, image to captions.

    python examples/app.py --model demo_output/model --images photos --captions captions.txt

Any LLM2CLIP, CLIP or SigLIP model. Images and captions are embedded once, at the start; on a CPU that takes about as
long as the vision tower needs for the folder. `llm2clip demo --app` shows the same page for the model of the demo.
"""

from dataclasses import dataclass, field

from transformers import HfArgumentParser

from llm2clip_hf.demo.app import import_gradio, launch_app
from llm2clip_hf.demo.search import SearchIndex, find_images, read_captions
from llm2clip_hf.evaluation.model_loading import load_model_and_processor


@dataclass
class Arguments:
    model: str = field(metadata={"help": "Folder or repository of the model."})
    images: str = field(metadata={"help": "Folder of images."})
    captions: str | None = field(default=None, metadata={"help": "Text file with one caption per line."})
    port: int = field(default=7860, metadata={"help": "Port on this machine."})


(arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
import_gradio()  # if it is missing, say so before the work

# 1. Load the model, and list what is searched.
model, processor = load_model_and_processor(arguments.model)
images = find_images(arguments.images)
captions = [] if arguments.captions is None else read_captions(arguments.captions)

# 2. Embed everything once.
index = SearchIndex.build(model, processor, images, captions, show_progress=True)

# 3. Serve the page to this machine.
launch_app(index, port=arguments.port)
