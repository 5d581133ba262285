#pragma once
#if defined(_WIN32)
#define SECATEUR_EXPORT extern "C" __declspec(dllexport)
#else
#define SECATEUR_EXPORT extern "C" __attribute__((visibility("default")))
#endif
