// Run an AOTInductor package without Python:  run_pt2 MODEL.pt2 IMAGE.f32 N C H W [cuda]
//
// IMAGE.f32 holds N*C*H*W float32 numbers in the machine's byte order, as `tensor.numpy().tofile(path)` writes them.
// The outputs are written beside it, as IMAGE.f32.out0, IMAGE.f32.out1, ..., and their shapes are printed.

#include <cstdint>
#include <fstream>
#include <iostream>
#include <stdexcept>
#include <string>
#include <vector>

#include <ATen/ops/empty.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

static at::Tensor read_image(const std::string& path, const std::vector<int64_t>& shape) {
  at::Tensor image = at::empty(shape, at::kFloat);
  std::ifstream file(path, std::ios::binary);
  if (!file.read(static_cast<char*>(image.data_ptr()), static_cast<std::streamsize>(image.nbytes()))) {
    throw std::runtime_error(path + " holds fewer numbers than the shape asks for");
  }
  return image;
}

static void write_output(const std::string& path, const at::Tensor& output) {
  const at::Tensor host = output.to(at::kCPU).contiguous();
  std::ofstream file(path, std::ios::binary);
  if (!file.write(static_cast<const char*>(host.data_ptr()), static_cast<std::streamsize>(host.nbytes()))) {
    throw std::runtime_error(path + " cannot be written");
  }
  std::cout << path << " " << host.sizes() << "\n";
}

int main(int argc, char** argv) {
  if (argc < 7) {
    std::cerr << "usage: run_pt2 MODEL.pt2 IMAGE.f32 N C H W [cuda]\n";
    return 2;
  }
  try {
    const std::string image_path = argv[2];
    std::vector<int64_t> shape;
    for (int i = 3; i < 7; ++i) shape.push_back(std::stoll(argv[i]));
    at::Tensor image = read_image(image_path, shape);
    if (argc > 7) image = image.to(at::Device(std::string(argv[7])));

    torch::inductor::AOTIModelPackageLoader model{std::string(argv[1])};
    const std::vector<at::Tensor> outputs = model.run({image});
    for (size_t i = 0; i < outputs.size(); ++i) write_output(image_path + ".out" + std::to_string(i), outputs[i]);
  } catch (const std::exception& error) {
    std::cerr << "run_pt2: " << error.what() << "\n";
    return 1;
  }
  return 0;
}
