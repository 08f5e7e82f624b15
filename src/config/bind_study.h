#pragma once

// The schema's Study into the plain struct of train/study_config.h.

#include "annulus/train/study_config.h"
#include "provenance.h"
#include "study.pb.h"

namespace annulus::config {

// Reads `study`, completing it with defaults; its paths, relative to `folder`, become absolute. Errors go to
// `provenance`.
StudySpec BindStudy(const std::string& folder, Study* study, Provenance* provenance);

}  // namespace annulus::config
