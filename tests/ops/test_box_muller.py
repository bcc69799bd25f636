"""csrc/core/box_muller.h, compiled here for the host, against long double over every exponent and every octant."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

CXX = shutil.which("g++") or shutil.which("clang++")

PROGRAM = r"""
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <vector>

#include "core/box_muller.h"

using Word = uint32_t;
using Real = long double;

const Real kPi = acosl(-1.0L);

Real true_radius(Word w) {
  const Real u = static_cast<float>(static_cast<double>(static_cast<float>(w)) * 0x1p-32 + 0x1p-33);  // exact, rounded
  return sqrtl(-2 * logl(u));
}

// With the sign that box_muller gives the radius.
void cos_sin(Word w, float& c, float& s) {
  ddpm_ext::cos_sin(w, c, s);
  if (ddpm_ext::flip_sign(1.0f, ddpm_ext::half_turns(w)) < 0) c = -c, s = -s;
}

void around(std::vector<Word>& words, double middle, int64_t reach) {
  for (int64_t w = static_cast<int64_t>(middle) - reach; w <= static_cast<int64_t>(middle) + reach; ++w)
    if (0 <= w && w < (int64_t{1} << 32)) words.push_back(static_cast<Word>(w));
}

int main() {
  // w from 0 on, and up to 2^32 - 1; around every power of two and where the logarithm's exponent changes; between them
  // 2^16 mantissas of each exponent
  std::vector<Word> radius_words;
  around(radius_words, 0, 1 << 17);
  around(radius_words, 0x1p32, 1 << 17);
  for (int e = 1; e < 32; ++e) {
    const double power = std::ldexp(1.0, e);
    around(radius_words, power, 1 << 10);
    around(radius_words, power * std::sqrt(2.0), 1 << 10);
    for (double m = 0; m < 0x1p16; ++m) radius_words.push_back(static_cast<Word>(power * (1 + m * 0x1p-16)));
  }
  // the eight octants' edges, and a sweep whose stride has no factor in common with 2^32
  std::vector<Word> angle_words;
  for (int octant = 0; octant <= 8; ++octant) around(angle_words, octant * 0x1p29, 1 << 12);
  for (uint64_t w = 0; w < uint64_t{1} << 32; w += 2141) angle_words.push_back(static_cast<Word>(w));

  Real radius_error = 0, angle_error = 0, normal_error = 0;
  bool finite = true;
  for (Word w : radius_words) {
    const float r = ddpm_ext::radius(w);
    finite = finite && std::isfinite(r) && r >= 0;
    radius_error = std::max(radius_error, fabsl(r - true_radius(w)));
  }
  for (Word w : angle_words) {
    float c, s;
    cos_sin(w, c, s);
    const Real angle = w * (kPi / 0x1p31L);
    finite = finite && std::isfinite(c) && std::isfinite(s);
    angle_error = std::max({angle_error, fabsl(c - cosl(angle)), fabsl(s - sinl(angle))});
  }

  // Both together: the largest radii and one of each exponent, at every octant's edge ±2 and along a sweep.
  std::vector<Word> radii, angles;
  around(radii, 0, 64);
  for (int e = 7; e < 32; ++e)
    for (int m = 0; m < 16; ++m) radii.push_back(static_cast<Word>(std::ldexp(1 + m / 16.0, e) - 1));
  around(radii, 0x1p32, 300);
  for (int octant = 0; octant <= 8; ++octant) around(angles, octant * 0x1p29, 2);
  for (uint64_t w = 0; w < uint64_t{1} << 32; w += 2097143) angles.push_back(static_cast<Word>(w));
  std::vector<Real> cosines, sines;
  for (Word w : angles) {
    cosines.push_back(cosl(w * (kPi / 0x1p31L)));
    sines.push_back(sinl(w * (kPi / 0x1p31L)));
  }
  for (Word w0 : radii) {
    const Real r = true_radius(w0);
    for (size_t i = 0; i < angles.size(); ++i) {
      float z0, z1;
      ddpm_ext::box_muller(w0, angles[i], z0, z1);
      normal_error = std::max({normal_error, fabsl(z0 - r * cosines[i]), fabsl(z1 - r * sines[i])});
    }
  }

  float c[2], s[2];
  for (int half = 0; half < 2; ++half) cos_sin(Word{0x80000000u} * half, c[half], s[half]);
  const bool halves = c[0] == 1 && s[0] == 0 && c[1] == -1 && s[1] == 0;
  printf("%.3Le %.3Le %.3Le %d %d %.9g %zu %zu\n", radius_error, angle_error, normal_error, finite, halves,
         ddpm_ext::radius(Word{0xffffffffu}), radius_words.size(), angle_words.size());
}
"""


@pytest.mark.skipif(CXX is None, reason="no C++ compiler")
def test_normals_are_near_the_formula(root: Path, tmp_path: Path):
    source, program = tmp_path / "normal.cpp", tmp_path / "normal"
    source.write_text(PROGRAM)
    flags = ["-std=c++17", "-O2", "-ffp-contract=off", "-fno-math-errno", f"-I{root / 'csrc'}"]
    subprocess.run([CXX, *flags, str(source), "-o", str(program)], check=True)
    printed = subprocess.run([program], check=True, capture_output=True, text=True).stdout.split()
    radius, angle, normal = map(float, printed[:3])
    finite, halves = printed[3:5]
    assert finite == "1"
    assert halves == "1"  # cos and sin are exact at half turns
    assert 0 < float(printed[5]) <= 1e-15  # u = 1
    assert radius <= 6.5e-7  # measured 5.34e-7, margin 1.2
    assert angle <= 2.1e-7  # measured 1.76e-7, margin 1.2
    assert normal <= 2e-6  # the contract; measured 1.27e-6
