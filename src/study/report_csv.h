#pragma once

// Comma-separated values as RFC 4180 has them.

#include <string>
#include <vector>

namespace annulus {

// Ends in CR LF; quotes where it must.
std::string CsvLine(const std::vector<std::string>& fields);

// To twelve digits; "nan", "inf" and "-inf" where it is not finite.
std::string CsvNumber(double value);

}  // namespace annulus
