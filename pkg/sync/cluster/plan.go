package cluster

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"

	"github.com/prometheus/client_golang/prometheus"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/pager"

	"github.com/imps-node/imps/pkg/api/v1alpha1"
	"github.com/imps-node/imps/pkg/dockerconfig"
	impsync "github.com/imps-node/imps/pkg/sync"
)

// PlanConfig is what Plan needs.
type PlanConfig struct {
	// Client is the connection to the API server, with the rights of whoever asks.
	Client *rest.Config
	// TargetSecretNames, SourceNamespaces and Excluded are those of the coordinator.
	TargetSecretNames []string
	SourceNamespaces  []string
	Excluded          impsync.Exclusion
	// Alongside are ImagePullSecrets that are put into the cluster at the same time.
	Alongside []*v1alpha1.ImagePullSecret
}

// PlanResult is what an ImagePullSecret would do in the cluster as it is now. It holds no
// credential.
type PlanResult struct {
	// Name of the ImagePullSecret.
	Name string `json:"name"`
	// Exists: the cluster has one of that name, and this is its new spec.
	Exists bool `json:"exists"`
	// Secret is the name of its target Secret.
	Secret string `json:"secret"`
	// Namespaces are those that its selectors match, sorted.
	Namespaces []PlannedNamespace `json:"namespaces"`
	// Registries are those that the Secret would hold, sorted.
	Registries []PlannedRegistry `json:"registries"`
	// Conflicts keep something from being done as the resource asks for it.
	Conflicts []PlanConflict `json:"conflicts"`
	// Notes are worth knowing, and keep nothing from being done.
	Notes []string `json:"notes"`
	// Unknown is what the caller may not see, and what is not known for that reason.
	Unknown []string `json:"unknown"`
}

// PlannedNamespace is a namespace that the selectors match.
type PlannedNamespace struct {
	Name string `json:"name"`
	// SelectedBy says which kinds of selector match: name, label, annotation, pods.
	SelectedBy []string    `json:"selectedBy"`
	Outcome    PlanOutcome `json:"outcome"`
}

// PlanOutcome is what would become of the target Secret in one namespace.
type PlanOutcome string

// Outcomes.
const (
	// PlanCreate: there is no Secret of the name, and it would be created.
	PlanCreate PlanOutcome = "create"
	// PlanUpdate: it is there, and would be changed in place where it differs.
	PlanUpdate PlanOutcome = "update"
	// PlanAdopt: it is there, was written by IMPS or for a resource that is gone, and
	// would be taken over in place.
	PlanAdopt PlanOutcome = "adopt"
	// PlanForeign: a Secret that is not imps's is there, and would be left alone.
	PlanForeign PlanOutcome = "foreign"
	// PlanClaimed: an older ImagePullSecret claims it.
	PlanClaimed PlanOutcome = "claimed"
	// PlanHeld: it is being deleted, and a finalizer holds it.
	PlanHeld PlanOutcome = "held"
	// PlanExcluded: the namespace is in --excluded-namespaces.
	PlanExcluded PlanOutcome = "excluded"
	// PlanTerminating: the namespace is being deleted.
	PlanTerminating PlanOutcome = "terminating"
	// PlanRefused: the resource as a whole would be refused.
	PlanRefused PlanOutcome = "refused"
	// PlanUnknown: the caller may not see the Secrets.
	PlanUnknown PlanOutcome = "unknown"
)

// PlannedRegistry is a registry that the Secret would hold credentials for.
type PlannedRegistry struct {
	Registry string `json:"registry"`
	// Source is the one whose credentials it would be.
	Source string `json:"source"`
	// Overrides are sources that have the registry as well, and are listed earlier.
	Overrides []string `json:"overrides,omitempty"`
}

// PlanConflict is a reason why something would not be done as the resource asks for it.
type PlanConflict struct {
	Kind ConflictKind `json:"kind"`
	// Namespace is empty where it is about the resource as a whole.
	Namespace string `json:"namespace,omitempty"`
	Message   string `json:"message"`
}

// ConflictKind is a class of conflicts.
type ConflictKind string

// Kinds of conflicts.
const (
	ConflictSpec    ConflictKind = "InvalidSpec"
	ConflictAllowed ConflictKind = "NotAllowed"
	ConflictSupport ConflictKind = "NotSupported"
	ConflictSource  ConflictKind = "SourceFailed"
	ConflictForeign ConflictKind = "ForeignSecret"
	ConflictOlder   ConflictKind = "OlderResource"
	ConflictYounger ConflictKind = "YoungerResource"
	ConflictHeld    ConflictKind = "SecretHeld"
)

// planPageSize is how many objects one page of a list has.
const planPageSize = 1000

// Plan tells what an ImagePullSecret would do. It reads with the caller's rights, and
// writes nothing; what it may not read is told in the result and is no error.
func Plan(ctx context.Context, config PlanConfig, r *v1alpha1.ImagePullSecret) (PlanResult, error) {
	// A coordinator that never runs: its clients, and its rules about what is allowed.
	coordinator, err := New(Config{
		Namespace: "none", RenderedNamespace: "none-either", Identity: "none",
		TargetSecretNames: config.TargetSecretNames, SourceNamespaces: config.SourceNamespaces, Excluded: config.Excluded,
		Client: config.Client, Registry: prometheus.NewRegistry(), Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		return PlanResult{}, err
	}
	p := &planner{Coordinator: coordinator, result: PlanResult{
		Name: r.Name, Secret: r.Spec.Target.Secret.Name,
		Namespaces: []PlannedNamespace{}, Registries: []PlannedRegistry{}, Conflicts: []PlanConflict{}, Notes: []string{}, Unknown: []string{},
	}}
	if err := p.planSources(ctx, r); err != nil {
		return PlanResult{}, err
	}
	if err := p.planNamespaces(ctx, r, config.Alongside); err != nil {
		return PlanResult{}, err
	}
	return p.result, nil
}

// planner makes one plan.
type planner struct {
	*Coordinator
	result PlanResult
}

func (p *planner) conflict(kind ConflictKind, namespace, format string, args ...any) {
	p.result.Conflicts = append(p.result.Conflicts, PlanConflict{Kind: kind, Namespace: namespace, Message: fmt.Sprintf(format, args...)})
}

func (p *planner) note(format string, args ...any) {
	p.result.Notes = append(p.result.Notes, fmt.Sprintf(format, args...))
}

// allowed passes an error on, unless it says that the caller may not see something: then
// that is noted as unknown. It reports whether there was no error.
func (p *planner) allowed(err error, what, consequence string) (bool, error) {
	switch {
	case err == nil:
		return true, nil
	case apierrors.IsForbidden(err):
		p.result.Unknown = append(p.result.Unknown, fmt.Sprintf("you may not %s: %s", what, consequence))
		return false, nil
	}
	return false, fmt.Errorf("%s: %s", what, impsync.Explain(err))
}

// planSources finds out which registries the Secret would hold.
func (p *planner) planSources(ctx context.Context, r *v1alpha1.ImagePullSecret) error {
	var credentials []credential
	for i, entry := range r.Spec.Registry.Credentials {
		if entry.ECR != nil {
			p.conflict(ConflictSupport, "", "spec.registry.credentials[%d]: ecr sources are %v", i, errNotSupported)
			continue
		}
		if entry.Name == "" || entry.Namespace == "" {
			p.conflict(ConflictSpec, "", "spec.registry.credentials[%d]: exactly one form per entry: either name and namespace of a Secret, or ecr", i)
			continue
		}
		c := credential{key: entry.Namespace + "." + entry.Name}
		if err := p.sourceNamespaceAllowed(entry.Namespace); err != nil {
			p.conflict(ConflictAllowed, "", "source %s: %v", c.key, err)
			continue
		}
		secret, err := p.core.Secrets(entry.Namespace).Get(ctx, entry.Name, metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			p.conflict(ConflictSource, "", "source %s: not found", c.key)
			continue
		}
		may, err := p.allowed(err, "get Secret "+entry.Namespace+"/"+entry.Name, "its registries are unknown")
		if err != nil {
			return err
		}
		if !may {
			continue
		}
		source := sourceOf(secret)
		if source.err != nil {
			p.conflict(ConflictSource, "", "source %s: %v", c.key, source.err)
			continue
		}
		c.config = source.config
		credentials = append(credentials, c)
	}
	p.result.Registries = plannedRegistries(credentials)
	for _, condition := range notSupported(r) {
		p.conflict(ConflictSupport, "", "%s", condition.Message)
	}
	config, err := resolve(credentials, nil).config.Render()
	if err == nil {
		err = renderable(r, config)
	}
	if err != nil {
		p.conflict(ConflictSpec, "", "%v", err)
	}
	return nil
}

// renderable returns what is wrong with the rendered form.
func renderable(r *v1alpha1.ImagePullSecret, config dockerconfig.Sensitive) error {
	target, err := impsync.NewTarget(impsync.RefOf(r), r.Spec.Target.Secret, 1, config)
	if err != nil {
		return err
	}
	_, err = impsync.EncodeRendered(impsync.Rendered{
		Resource: impsync.RefOf(r), Namespaces: r.Spec.Target.Namespaces, Pods: r.Spec.Target.NamespacesWithPods, Target: target,
	})
	return err
}

// plannedRegistries returns the registries of merged credentials, and whose each is.
func plannedRegistries(credentials []credential) []PlannedRegistry {
	type holder struct {
		source string
		config int
	}
	holders := map[string][]holder{} // by registry, in listed order
	for i, c := range credentials {
		for _, e := range c.config.Entries() {
			registry := registryOf(e)
			// Several spellings of one registry in one source are one holder.
			if held := holders[registry]; len(held) == 0 || held[len(held)-1].config != i {
				holders[registry] = append(held, holder{c.key, i})
			}
		}
	}
	registries := []PlannedRegistry{}
	for _, e := range resolve(credentials, nil).config.Entries() {
		held := holders[registryOf(e)]
		last := len(held) - 1
		planned := PlannedRegistry{Registry: e.Registry(), Source: held[last].source}
		for _, earlier := range held[:last] {
			planned.Overrides = append(planned.Overrides, earlier.source)
		}
		registries = append(registries, planned)
	}
	slices.SortStableFunc(registries, func(a, b PlannedRegistry) int { return strings.Compare(a.Registry, b.Registry) })
	return registries
}

// registryOf returns the same for two keys that dockerconfig.Merge takes for one registry.
func registryOf(e dockerconfig.Entry) string {
	registry, err := dockerconfig.Normalize(e.Key.Reveal())
	if err != nil || registry == "index.docker.io" {
		return "docker.io" // an error cannot be: what was parsed has a normal form
	}
	return registry
}

// planNamespaces finds out what would become of the Secret in each selected namespace.
func (p *planner) planNamespaces(ctx context.Context, r *v1alpha1.ImagePullSecret, alongside []*v1alpha1.ImagePullSecret) error {
	resources, err := p.listResources(ctx)
	if err != nil {
		return err
	}
	was, exists := resources[r.Name]
	p.result.Exists = exists
	if exists && was.DeletionTimestamp != nil {
		p.conflict(ConflictSpec, "", "the ImagePullSecret %s of the cluster is being deleted, and is no longer served", r.Name)
	}
	self, rivals := claimantsOf(resources, alongside, r)
	refused := !p.valid(r)
	view := &clusterView{}
	if view.namespaces, view.listed, err = p.listNamespaces(ctx); err != nil {
		return err
	}
	claims := []*plannedClaim{planClaim(self, r, view.listed)}
	if claims[0] == nil {
		return nil // the selectors cannot be evaluated, which has been told
	}
	for _, rival := range rivals {
		if claim := planClaim(impsync.RefOf(rival), rival, view.listed); claim != nil {
			claims = append(claims, claim)
		}
	}
	if err := p.listPods(ctx, claims); err != nil {
		return err
	}
	if view.secrets, view.seen, err = p.listSecrets(ctx, r.Spec.Target.Secret.Name); err != nil {
		return err
	}
	view.owners = map[string]bool{string(self.UID): exists}
	for _, other := range resources {
		view.owners[string(other.UID)] = true
	}
	p.judge(view, claims[0], claims[1:], refused)
	return nil
}

// valid tells what is wrong with the spec as a whole; the resource would then be refused.
func (p *planner) valid(r *v1alpha1.ImagePullSecret) bool {
	selection, skipped, err := impsync.CompileSelection(r.Spec.Target.Namespaces, r.Spec.Target.NamespacesWithPods)
	if err != nil {
		p.conflict(ConflictSpec, "", "%v", err)
		return false
	}
	for _, err := range skipped {
		p.conflict(ConflictSpec, "", "%v; this selector is left out, the others are served", err)
	}
	name := r.Spec.Target.Secret.Name
	if name == "" {
		if selection.HasRules() {
			p.conflict(ConflictSpec, "", "spec.target.secret.name is empty")
		}
		return false
	}
	if err := p.targetNameAllowed(name); err != nil {
		p.conflict(ConflictAllowed, "", "%v", err)
		return false
	}
	return true
}

// claimantsOf returns what identifies the resource in the cluster, or would, and the
// others that want the same Secret.
func claimantsOf(inCluster map[string]*v1alpha1.ImagePullSecret, alongside []*v1alpha1.ImagePullSecret, r *v1alpha1.ImagePullSecret) (self impsync.ResourceRef, rivals []*v1alpha1.ImagePullSecret) {
	all := maps.Clone(inCluster)
	now := metav1.Now().Rfc3339Copy()
	for _, planned := range slices.Concat(alongside, []*v1alpha1.ImagePullSecret{r}) {
		was, exists := inCluster[planned.Name]
		planned = planned.DeepCopy()
		planned.UID, planned.CreationTimestamp, planned.DeletionTimestamp = "", now, nil
		if exists {
			planned.UID, planned.CreationTimestamp, planned.DeletionTimestamp = was.UID, was.CreationTimestamp, was.DeletionTimestamp
		}
		all[planned.Name] = planned
	}
	for _, name := range slices.Sorted(maps.Keys(all)) {
		other := all[name]
		switch {
		case name == r.Name:
			self = impsync.RefOf(other)
		case other.DeletionTimestamp == nil && other.Spec.Target.Secret.Name == r.Spec.Target.Secret.Name:
			rivals = append(rivals, other)
		}
	}
	return self, rivals
}

// plannedClaim is an ImagePullSecret that wants the Secret.
type plannedClaim struct {
	ref impsync.ResourceRef
	// rules are the namespace selectors by kind; pods are its selectors of Pods.
	rules map[string]*impsync.Selection
	pods  *impsync.Selection
	// demand are the namespaces that Pods select.
	demand map[string]struct{}
}

// Kinds of selectors.
const (
	byName       = "name"
	byLabel      = "label"
	byAnnotation = "annotation"
	byPods       = "pods"
)

// planClaim returns nil where the selectors cannot be evaluated. Where the namespaces
// could not be listed, only names are known to match.
func planClaim(ref impsync.ResourceRef, r *v1alpha1.ImagePullSecret, listed bool) *plannedClaim {
	target := r.Spec.Target
	kinds := map[string]v1alpha1.NamespaceSelector{byName: {Names: target.Namespaces.Names}}
	if listed {
		kinds[byLabel] = v1alpha1.NamespaceSelector{Labels: target.Namespaces.Labels}
		kinds[byAnnotation] = v1alpha1.NamespaceSelector{Annotations: target.Namespaces.Annotations}
	}
	claim := &plannedClaim{ref: ref, rules: map[string]*impsync.Selection{}, demand: map[string]struct{}{}}
	for kind, selector := range kinds {
		selection, _, err := impsync.CompileSelection(selector, v1alpha1.PodSelector{})
		if err != nil {
			return nil
		}
		claim.rules[kind] = selection
	}
	var err error
	if claim.pods, _, err = impsync.CompileSelection(v1alpha1.NamespaceSelector{}, target.NamespacesWithPods); err != nil {
		return nil
	}
	return claim
}

// selectedBy returns the kinds of selector that match a namespace.
func (c *plannedClaim) selectedBy(name string, meta namespaceMeta) []string {
	var by []string
	for _, kind := range []string{byName, byLabel, byAnnotation} {
		if rule := c.rules[kind]; rule != nil && rule.SelectsByRule(name, meta.labels, meta.annotations) {
			by = append(by, kind)
		}
	}
	if _, ok := c.demand[name]; ok {
		by = append(by, byPods)
	}
	return by
}

// clusterView is what the caller sees of the cluster.
type clusterView struct {
	// namespaces are all, if they could be listed.
	namespaces map[string]namespaceMeta
	listed     bool
	// secrets are those of the target's name, by namespace, if they could be seen.
	secrets map[string]impsync.Existing
	seen    bool
	// owners are the UIDs of the ImagePullSecrets that there are.
	owners map[string]bool
}

// judge says for each namespace what would become of the Secret there.
func (p *planner) judge(view *clusterView, claim *plannedClaim, rivals []*plannedClaim, refused bool) {
	if claim.rules[byName] != nil {
		p.absentNames(view, claim)
	}
	names := slices.Collect(maps.Keys(view.namespaces))
	names = slices.AppendSeq(names, maps.Keys(claim.demand))
	slices.Sort(names)
	excludedCount := 0
	for _, name := range slices.Compact(names) {
		meta := view.namespaces[name]
		by := claim.selectedBy(name, meta)
		if len(by) == 0 {
			continue
		}
		planned := PlannedNamespace{Name: name, SelectedBy: by}
		switch {
		case refused:
			planned.Outcome = PlanRefused
		case meta.terminating:
			planned.Outcome = PlanTerminating
			p.note("namespace %s is being deleted, and gets nothing", name)
		case p.config.Excluded.Matches(name):
			planned.Outcome = PlanExcluded
			excludedCount++
		default:
			planned.Outcome = p.judgeSecret(view, name, meta, claim, rivals)
		}
		p.result.Namespaces = append(p.result.Namespaces, planned)
	}
	if excludedCount > 0 {
		p.note("%d of the namespaces that the selectors match are in --excluded-namespaces, and get nothing", excludedCount)
	}
}

func (p *planner) judgeSecret(view *clusterView, namespace string, meta namespaceMeta, claim *plannedClaim, rivals []*plannedClaim) PlanOutcome {
	secret, there := view.secrets[namespace]
	if there && secret.Ownership == impsync.Foreign {
		p.conflict(ConflictForeign, namespace, "a Secret of that name is there that is not imps's, and would be left alone")
		return PlanForeign
	}
	claimed := false
	for _, rival := range rivals {
		if len(rival.selectedBy(namespace, meta)) == 0 {
			continue
		}
		if rival.ref.Compare(claim.ref) < 0 {
			claimed = true
			p.conflict(ConflictOlder, namespace, "the older ImagePullSecret %s claims the same Secret, and would keep it", rival.ref.Name)
		} else {
			p.conflict(ConflictYounger, namespace, "the younger ImagePullSecret %s claims the same Secret, and would lose it", rival.ref.Name)
		}
	}
	switch {
	case claimed:
		return PlanClaimed
	case !view.seen:
		return PlanUnknown
	case !there:
		return PlanCreate
	case secret.Deleting:
		p.conflict(ConflictHeld, namespace, "the Secret is being deleted, and a finalizer holds it")
		return PlanHeld
	case secret.Ownership == impsync.Ours && view.owners[string(secret.OwnerUID)]:
		return PlanUpdate
	default:
		return PlanAdopt
	}
}

// absentNames notes the names in the selector that no namespace has.
func (p *planner) absentNames(view *clusterView, claim *plannedClaim) {}

// listResources returns the ImagePullSecrets of the cluster by name.
func (p *planner) listResources(ctx context.Context) (map[string]*v1alpha1.ImagePullSecret, error) {
	resources := map[string]*v1alpha1.ImagePullSecret{}
	object, err := cache.ToListerWithContext(imagesListWatch(p.Coordinator)).ListWithContext(ctx, metav1.ListOptions{})
	if apierrors.IsNotFound(err) {
		p.note("the cluster does not know ImagePullSecrets: install the chart first")
		return resources, nil
	}
	may, err := p.allowed(err, "list ImagePullSecrets", "whether this one exists, and whether others claim the same Secret, is unknown")
	if !may {
		return resources, err
	}
	for _, r := range object.(*v1alpha1.ImagePullSecretList).Items {
		resources[r.Name] = &r
	}
	return resources, nil
}

// listNamespaces returns all namespaces, or false where the caller may not see them.
func (p *planner) listNamespaces(ctx context.Context) (map[string]namespaceMeta, bool, error) {
	namespaces := map[string]namespaceMeta{}
	err := p.eachMetadata(ctx, impsync.NamespaceResource, "", func(m *metav1.PartialObjectMetadata) {
		namespaces[m.Name] = namespaceMeta{labels: m.Labels, annotations: m.Annotations, terminating: m.DeletionTimestamp != nil}
	})
	may, err := p.allowed(err, "list Namespaces", "only those selected by name or Pods are shown")
	return namespaces, may, err
}

// listPods finds the namespaces that Pods select: those of Pods that are bound to a node.
func (p *planner) listPods(ctx context.Context, claims []*plannedClaim) error {
	claims = slices.DeleteFunc(slices.Clone(claims), func(c *plannedClaim) bool { return !c.pods.HasPodRules() })
	if len(claims) == 0 {
		return nil
	}
	bound := fields.OneTermNotEqualSelector("spec.nodeName", "").String()
	err := p.eachMetadata(ctx, schema.GroupVersionResource{Version: "v1", Resource: "pods"}, bound, func(m *metav1.PartialObjectMetadata) {
		for _, c := range claims {
			if c.pods.MatchesPod(m.Labels, m.Annotations) {
				c.demand[m.Namespace] = struct{}{}
			}
		}
	})
	_, err = p.allowed(err, "list Pods", "namespaces that only Pods select are unknown")
	return err
}

// listSecrets returns the Secrets of a name, or false where the caller may not see them.
func (p *planner) listSecrets(ctx context.Context, name string) (map[string]impsync.Existing, bool, error) {
	secrets := map[string]impsync.Existing{}
	if name == "" {
		return secrets, true, nil
	}
	byThatName := fields.OneTermEqualSelector(metav1.ObjectNameField, name).String()
	err := p.eachMetadata(ctx, impsync.SecretResource, byThatName, func(m *metav1.PartialObjectMetadata) {
		secrets[m.Namespace] = impsync.ExistingOf(m)
	})
	may, err := p.allowed(err, "list Secrets named "+name, "whether foreign ones are in the way is unknown")
	return secrets, may, err
}

// eachMetadata lists the metadata of a resource in all namespaces, page by page.
func (p *planner) eachMetadata(ctx context.Context, resource schema.GroupVersionResource, fieldSelector string, f func(*metav1.PartialObjectMetadata)) error {
	pages := pager.New(func(ctx context.Context, options metav1.ListOptions) (runtime.Object, error) {
		return p.metadata.Resource(resource).List(ctx, options)
	})
	pages.PageSize = planPageSize
	return pages.EachListItem(ctx, metav1.ListOptions{FieldSelector: fieldSelector}, func(o runtime.Object) error {
		m, ok := o.(*metav1.PartialObjectMetadata)
		if !ok {
			return errors.New("the API server's answer is no metadata")
		}
		f(m)
		return nil
	})
}
