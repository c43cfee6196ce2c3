// Runs an AOTInductor package with libtorch alone: runner PACKAGE CALLS RESULTS
// CALLS holds a list of calls, each a list of input tensors, or a dict of new constants.
#include <fstream>
#include <iterator>
#include <vector>

#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>

static std::vector<char> bytes_of(const char* path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

int main(int argc, char** argv) {
  torch::inductor::AOTIModelPackageLoader loader(argv[1]);
  c10::List<at::Tensor> results;
  const c10::IValue calls = torch::jit::pickle_load(bytes_of(argv[2]));
  for (const c10::IValue& call : calls.toListRef()) {
    if (call.isGenericDict()) {
      std::unordered_map<std::string, at::Tensor> constants;
      for (const auto& entry : call.toGenericDict()) {
        constants[entry.key().toStringRef()] = entry.value().toTensor();
      }
      loader.load_constants(constants, /*use_inactive=*/false, /*check_full_update=*/false);
      continue;
    }
    std::vector<at::Tensor> inputs;
    for (const c10::IValue& input : call.toListRef()) {
      inputs.push_back(input.toTensor());
    }
    results.push_back(loader.run(inputs)[0]);
  }
  const std::vector<char> saved = torch::jit::pickle_save(results);
  std::ofstream(argv[3], std::ios::binary).write(saved.data(), saved.size());
  return 0;
}
