#include "vector_plain.h"

#include "kernels.h"

const rsa::Passes& rsa::plain_passes(Element element) {
  return passes_of<PlainVector<float>, PlainVector<double>>(element);
}
