package main

import (
	"errors"
	"fmt"
	"net"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/pflag"
	"k8s.io/apimachinery/pkg/util/validation"

	"github.com/imps-node/imps/pkg/nodecache"
	impsync "github.com/imps-node/imps/pkg/sync"
	"github.com/imps-node/imps/pkg/sync/cluster"
)

// The duties.
const (
	dutyNode    = "node"
	dutyCluster = "cluster"
)

// list is the value of a flag that takes a comma list. Given again, it is replaced.
type list []string

func (l *list) String() string { return strings.Join(*l, ",") }

func (*list) Type() string { return "list" }

func (l *list) Set(value string) error {
	*l = nil
	for element := range strings.SplitSeq(value, ",") {
		if element = strings.TrimSpace(element); element != "" {
			*l = append(*l, element)
		}
	}
	return nil
}

// limits are the flags by which an installation limits what resources may ask for.
type limits struct {
	targetSecretNames  list
	sourceNamespaces   list
	excludedNamespaces list
	allowRescue        bool
}

func (l *limits) register(flags *pflag.FlagSet) {
	*l = limits{targetSecretNames: list{"imps-pull-secret"}, sourceNamespaces: list{"registry-access"}}
	flags.Var(&l.targetSecretNames, "target-secret-names", "comma `list` of the names that target Secrets may have; * allows any")
	flags.Var(&l.sourceNamespaces, "source-namespaces", "comma `list` of the namespaces that source Secrets may be in; * allows any")
	flags.Var(&l.excludedNamespaces, "excluded-namespaces", "comma `list` of namespaces that no resource selects; names, or globs such as kube-*")
	flags.BoolVar(&l.allowRescue, "allow-rescue", false, "let spec.target.rescue have Pods evicted that cannot pull, as they came before their ServiceAccount named the Secret")
}

func (l *limits) validate() error {
	_, err := impsync.ParseExclusion(l.excludedNamespaces)
	if err != nil {
		err = fmt.Errorf("--excluded-namespaces: %w", err)
	}
	if len(l.targetSecretNames) == 0 {
		err = errors.Join(err, errors.New("--target-secret-names: no name is left: give at least one, or * for any"))
	}
	return errors.Join(
		namesValid("target-secret-names", l.targetSecretNames, validation.IsDNS1123Subdomain),
		namesValid("source-namespaces", l.sourceNamespaces, validation.IsDNS1123Label),
		err)
}

// namesValid checks a list of names, or * alone.
func namesValid(flag string, names list, check func(string) []string) error {
	var errs []error
	for _, name := range names {
		switch problems := check(name); {
		case name == cluster.Any && len(names) > 1:
			errs = append(errs, fmt.Errorf("--%s: * allows every name: give it alone, or leave it out", flag))
		case name != cluster.Any && len(problems) > 0:
			errs = append(errs, fmt.Errorf("--%s: %q is not a valid name: %s", flag, name, problems[0]))
		}
	}
	return errors.Join(errs...)
}

// process are the flags of every command that runs until it is told to stop.
type process struct {
	kubeconfig  string
	metricsAddr string
	healthAddr  string
	logLevel    string
	logFormat   string
}

func (p *process) register(flags *pflag.FlagSet) {
	flags.StringVar(&p.kubeconfig, "kubeconfig", "", "`file` that says how to reach the API server; empty: as a Pod of the cluster does")
	flags.StringVar(&p.metricsAddr, "metrics-addr", "127.0.0.1:9464", "`address` of /metrics; 0: none")
	flags.StringVar(&p.healthAddr, "health-addr", ":9465", "`address` of /healthz and /readyz; 0: none")
	flags.StringVar(&p.logLevel, "log-level", levelInfo, "`level`: debug, info, warn or error")
	flags.StringVar(&p.logFormat, "log-format", formatJSON, "`format`: json, or text for people")
}

func (p *process) validate() error {
	p.logLevel, p.logFormat = strings.ToLower(p.logLevel), strings.ToLower(p.logFormat)
	if p.logFormat == formatLogfmt {
		p.logFormat = formatText // banzaicloud/imps's word for it
	}
	return errors.Join(
		addressValid("metrics-addr", p.metricsAddr),
		addressValid("health-addr", p.healthAddr),
		oneOf("log-level", p.logLevel, levels()...),
		oneOf("log-format", p.logFormat, formatJSON, formatText),
	)
}

// settings are the flags of run.
type settings struct {
	limits
	process
	duties            list
	nodeName          string
	namespace         string
	renderedNamespace string
	nodeCacheDir      string
	kubeAPIQPS        float32
	demandLinger      time.Duration
}

func (s *settings) register(flags *pflag.FlagSet) {
	flags.SortFlags = false
	s.duties = list{dutyNode}
	flags.Var(&s.duties, "duties", "comma `list` of what this process does: node, cluster")
	flags.StringVar(&s.nodeName, "node-name", "", "`name` of the node that is served; the node duty needs it")
	flags.StringVar(&s.namespace, "namespace", "imps-system", "`namespace` of the Lease, the node reports and the state")
	flags.StringVar(&s.renderedNamespace, "rendered-namespace", "imps-rendered", "`namespace` of the rendered Secrets, and of nothing else")
	s.limits.register(flags)
	flags.StringVar(&s.nodeCacheDir, "node-cache-dir", "", "`folder` on a tmpfs that imps-credprovider answers kubelets from, such as "+nodecache.DefaultDir+"; empty: none")
	flags.Float32Var(&s.kubeAPIQPS, "kube-api-qps", 0, "`number` of requests a second to the API server; 0: no limit but the server's own")
	flags.DurationVar(&s.demandLinger, "demand-linger", cluster.DefaultDemandLinger, "`time` for which a namespace keeps its Secret after its last Pod; the cluster duty heeds it")
	s.process.register(flags)
}

func (s *settings) validate() error {
	errs := []error{
		s.dutiesValid(),
		nameValid("namespace", s.namespace, validation.IsDNS1123Label),
		nameValid("rendered-namespace", s.renderedNamespace, validation.IsDNS1123Label),
		s.limits.validate(),
		s.process.validate(),
	}
	if s.namespace == s.renderedNamespace {
		errs = append(errs, errors.New("--rendered-namespace: it must not be --namespace: every agent may read all that is in it"))
	}
	if slices.Contains(s.sourceNamespaces, s.renderedNamespace) {
		errs = append(errs, errors.New("--rendered-namespace: it must not be one of --source-namespaces: every agent may read all that is in it"))
	}
	if !(s.kubeAPIQPS >= 0) { // NaN neither
		errs = append(errs, fmt.Errorf("--kube-api-qps: %v is no rate: give a number of requests, or 0 for no limit", s.kubeAPIQPS))
	}
	if s.demandLinger <= 0 {
		errs = append(errs, fmt.Errorf("--demand-linger: %v is too short: give a time such as 1m", s.demandLinger))
	}
	return errors.Join(errs...)
}

// dutiesValid checks the duties and puts them into their order.
func (s *settings) dutiesValid() error {
	for _, duty := range s.duties {
		if duty != dutyNode && duty != dutyCluster {
			return fmt.Errorf("--duties: %q is not a duty: use node, cluster, or node,cluster", duty)
		}
	}
	slices.SortFunc(s.duties, func(a, b string) int { return strings.Compare(b, a) }) // node first
	s.duties = slices.Compact(s.duties)
	switch {
	case len(s.duties) == 0:
		return errors.New("--duties: no duty is left: use node, cluster, or node,cluster")
	case slices.Contains(s.duties, dutyNode) && s.nodeName == "":
		return errors.New("--node-name: the node duty needs the name of its node: set the flag, or NODE_NAME to the Pod's spec.nodeName")
	case s.nodeName != "":
		return nameValid("node-name", s.nodeName, validation.IsDNS1123Subdomain)
	}
	return nil
}

func nameValid(flag, name string, check func(string) []string) error {
	if problems := check(name); len(problems) > 0 {
		return fmt.Errorf("--%s: %q is not a valid name: %s", flag, name, problems[0])
	}
	return nil
}

// isOff reports whether an address says that there is to be no server.
func isOff(address string) bool { return address == "" || address == "0" }

func addressValid(flag, address string) error {
	if isOff(address) {
		return nil
	}
	_, port, err := net.SplitHostPort(address)
	if err == nil {
		_, err = strconv.ParseUint(port, 10, 16)
	}
	if err != nil {
		return fmt.Errorf("--%s: %q is not an address: use host:port, :port, or 0 for none", flag, address)
	}
	return nil
}

// environmentOf returns the names of the variables that set a flag, the strongest first.
func environmentOf(flag string) []string {
	names := []string{"IMPS_" + strings.ToUpper(strings.ReplaceAll(flag, "-", "_"))}
	switch flag {
	case "node-name":
		names = append(names, "NODE_NAME")
	case "namespace":
		names = append(names, "POD_NAMESPACE")
	case "log-level":
		names = append(names, "LOG_LEVEL")
	case "log-format":
		names = append(names, "LOG_FORMAT")
	}
	return names
}

// environmentKey is the annotation of a flag that holds the variables that set it.
const environmentKey = "environment"

// bindEnvironment lets the environment set these flags, and says so in their help.
func bindEnvironment(flags *pflag.FlagSet) {
	flags.VisitAll(func(f *pflag.Flag) {
		names := environmentOf(f.Name)
		f.Annotations = map[string][]string{environmentKey: names}
		f.Usage += " [" + strings.Join(names, ", ") + "]"
	})
}

// applyEnvironment sets the flags that the command line does not give. An empty variable
// counts as one that is not there.
func applyEnvironment(flags *pflag.FlagSet, getenv func(string) string) error {
	var errs []error
	flags.VisitAll(func(f *pflag.Flag) {
		for _, name := range f.Annotations[environmentKey] {
			value := getenv(name)
			if f.Changed || value == "" {
				continue
			}
			if err := f.Value.Set(value); err != nil {
				errs = append(errs, fmt.Errorf("%s: %q is not valid for --%s: %w", name, value, f.Name, err))
			}
			return
		}
	})
	return errors.Join(errs...)
}
