// Runs a package made by export.py without Python:
//
//     generate path/to/_ops.so model.pt2 NUM_TOKENS ID [ID ...]
//
// `_ops.so` registers fastinfer's operators with libtorch when it is loaded; the package calls them
// by name. Prints the prompt and greedily chosen tokens. Every step runs the whole sequence: this
// shows loading, not speed.

#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

#include <cstdint>
#include <cstdlib>
#include <exception>
#include <iostream>
#include <vector>

int main(int argc, char** argv) {
  if (argc < 6) {
    std::cerr << "usage: generate OPS_LIBRARY PACKAGE NUM_TOKENS ID ID [ID ...]\n";
    return 2;
  }
  if (dlopen(argv[1], RTLD_NOW | RTLD_GLOBAL) == nullptr) {
    std::cerr << "generate: " << argv[1] << " could not be loaded: " << dlerror() << "\n";
    return 1;
  }
  try {
    c10::InferenceMode guard;
    torch::inductor::AOTIModelPackageLoader model(argv[2]);
    const torch::Device device(model.get_metadata().at("AOTI_DEVICE_KEY"));  // "cpu" or "cuda"
    std::vector<std::int64_t> tokens;
    for (int i = 4; i < argc; ++i) tokens.push_back(std::atoll(argv[i]));
    const int wanted = std::atoi(argv[3]);
    for (int step = 0; step < wanted; ++step) {
      const auto ids = torch::tensor(tokens, torch::kInt64).unsqueeze(0).to(device);
      const auto logits = model.run({ids, torch::ones_like(ids)}).at(0);
      tokens.push_back(logits.select(1, -1).argmax(-1).item<std::int64_t>());
    }
    for (const auto token : tokens) std::cout << token << " ";
    std::cout << "\n";
  } catch (const std::exception& error) {
    std::cerr << "generate: " << error.what() << "\n";
    return 1;
  }
  return 0;
}
