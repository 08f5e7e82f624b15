#pragma once

// The style sheet of reports. Series colors c0 to c7 keep 3:1 against the page and differ for the color-blind
// too; on paper the page is always light.

namespace annulus {

inline constexpr char kHtmlStyle[] = R"css(
:root{--page:#fff;--card:#f6f7f9;--ink:#1a1d21;--soft:#555c66;--rule:#d5d9df;--link:#0b5cad;
--c0:#0068b0;--c1:#c44a00;--c2:#00795a;--c3:#a03c86;--c4:#836300;--c5:#2b83b8;--c6:#7a1f4b;--c7:#4a4f57}
@media screen and (prefers-color-scheme:dark){
:root{--page:#14171b;--card:#1d2126;--ink:#e7e9ec;--soft:#a5adb8;--rule:#3a4049;--link:#7fbcf5;
--c0:#5aa9ea;--c1:#f2894e;--c2:#3fc39a;--c3:#dd8cc8;--c4:#d9b343;--c5:#9ad7f7;--c6:#e77fa5;--c7:#b9c0ca}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
header,main{max-width:84rem;margin:0 auto;padding:0 1.25rem}
header{padding-top:1.5rem}
h1{font-size:1.7rem;line-height:1.2;margin:0 0 .4rem;overflow-wrap:anywhere}
h2{font-size:1.25rem;line-height:1.3;margin:0 0 .4rem}
p,li{max-width:48rem;margin:.3rem 0;overflow-wrap:anywhere}
section{border-top:1px solid var(--rule);margin-top:1.8rem;padding-top:1.2rem}
a{color:var(--link)}
nav ul{list-style:none;margin:.6rem 0 0;padding:0;display:flex;flex-wrap:wrap;gap:.1rem 1.1rem}
.legend{list-style:none;margin:.6rem 0 .2rem;padding:0;display:flex;flex-wrap:wrap;
gap:.1rem 1.2rem;font-size:.9rem}
.legend li{margin:0;display:flex;align-items:center;gap:.45rem}
.swatch{width:28px;height:16px;flex:none}
.panels{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,25rem),1fr));gap:.6rem 2rem}
figure{margin:.5rem 0;max-width:38rem}
figcaption{font-weight:600;font-size:.95rem;overflow-wrap:anywhere}
.chart{display:block;width:100%;height:auto}
.pair,.stack{display:grid;grid-template-columns:minmax(0,1fr);gap:.4rem 2.5rem}
@media screen and (min-width:70rem){.pair{grid-template-columns:minmax(0,38rem) minmax(0,1fr)}}
.scroll{overflow:auto;max-height:26rem;margin:.5rem 0;align-self:start;justify-self:start;
max-width:100%;padding:.3rem .7rem;border:1px solid var(--rule);border-radius:.4rem}
.scroll:focus-visible{outline:2px solid var(--link);outline-offset:2px}
table{border-collapse:collapse;font-size:.875rem;font-variant-numeric:tabular-nums}
caption{text-align:left;color:var(--soft);padding-bottom:.3rem}
th,td{text-align:left;vertical-align:top;padding:.22rem .8rem .22rem 0;border-bottom:1px solid var(--rule)}
th{font-weight:500}
thead th{font-weight:600;position:sticky;top:-.3rem;background:var(--page);vertical-align:bottom}
.n{text-align:right;white-space:nowrap}
td{max-width:26rem}
pre{overflow:auto;background:var(--card);padding:.8rem;font-size:.8rem;line-height:1.4}
summary{cursor:pointer}
svg text{font:13px system-ui,sans-serif;fill:var(--ink);paint-order:stroke;stroke:var(--page);stroke-width:3px;
stroke-linejoin:round}
svg .tick,svg .name{fill:var(--soft)}
svg .end{text-anchor:end}svg .mid{text-anchor:middle}
svg .end-label{fill:var(--c)}
.grid{stroke:var(--rule);stroke-width:1}.axis{stroke:var(--soft);stroke-width:1}
.mark{stroke:var(--soft);stroke-width:1;stroke-dasharray:2 3}
.limit{stroke:var(--ink);stroke-width:1.5;stroke-dasharray:6 3}
.lead{stroke:var(--c);stroke-width:1;opacity:.6}
.c0{--c:var(--c0)}.c1{--c:var(--c1)}.c2{--c:var(--c2)}.c3{--c:var(--c3)}
.c4{--c:var(--c4)}.c5{--c:var(--c5)}.c6{--c:var(--c6)}.c7{--c:var(--c7)}
.line{fill:none;stroke:var(--c);stroke-width:2;stroke-linejoin:round}
.line.simulated{stroke-dasharray:6 4}
.line.guide{stroke-width:1.3;stroke-dasharray:1.5 3.5}
.dot{stroke:var(--c);stroke-width:1.8;fill:var(--c)}
.dot.simulated{fill:var(--page)}
.band{fill:var(--c);opacity:.22}
.area{fill:var(--c);stroke:var(--page);stroke-width:1}
.bar{fill:var(--c);stroke:var(--page);stroke-width:1}
.bar.simulated{fill-opacity:.35;stroke:var(--c);stroke-dasharray:3 2}
@media (max-width:32rem){header,main{padding-left:.8rem;padding-right:.8rem}h1{font-size:1.4rem}}
@page{margin:14mm}
@media print{
body{font-size:10pt}
header,main{max-width:none;padding:0}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}
nav,section:has(details){display:none}
h2,section>p,figcaption,caption,.legend{break-after:avoid}
figure,tr,p,.legend{break-inside:avoid}
.pair,.stack,.panels,.legend{display:block}
.legend li{display:inline-flex;margin-right:1.2rem}
figure{max-width:13cm}
.stack figure{display:inline-block;width:48%;margin-right:1%;vertical-align:top}
.scroll{overflow:visible;max-height:none;border:0;padding:0}
thead{display:table-header-group}thead th{position:static}
table{font-size:8pt}th,td{padding-right:.5rem}
td,th{overflow-wrap:break-word}
tbody th:not(.n){overflow-wrap:anywhere;min-width:9em}
a{color:inherit;text-decoration:none}}
)css";

}  // namespace annulus
