// MOE_EFA_CLONES before a function compiles it for several instruction sets, of which the loader picks the best here.
// It works on functions, not on templates. Sanitizers run before the loader's choice may, so not with them.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__) && \
    !defined(__SANITIZE_THREAD__)
#define MOE_EFA_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define MOE_EFA_CLONES
#endif
