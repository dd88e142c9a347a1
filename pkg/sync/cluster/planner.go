package cluster

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/pager"

	"github.com/imps-node/imps/pkg/api/v1alpha1"
	"github.com/imps-node/imps/pkg/dockerconfig"
	impsync "github.com/imps-node/imps/pkg/sync"
)

// planPageSize is how many objects one page of a list has.
const planPageSize = 1000

// planner makes one plan.
type planner struct {
	*Coordinator
	resource *v1alpha1.ImagePullSecret
	// refused: a conflict keeps everything from being delivered.
	refused bool
	result  PlanResult
}

func (p *planner) conflict(kind ConflictKind, namespace, format string, args ...any) {
	p.result.Conflicts = append(p.result.Conflicts, PlanConflict{Kind: kind, Namespace: namespace, Message: fmt.Sprintf(format, args...)})
}

// refuse is a conflict that keeps everything from being delivered.
func (p *planner) refuse(kind ConflictKind, format string, args ...any) {
	p.refused = true
	p.conflict(kind, "", format, args...)
}

func (p *planner) note(format string, args ...any) {
	p.result.Notes = append(p.result.Notes, fmt.Sprintf(format, args...))
}

// may reports whether the caller may do something that returned err; if not, the result
// tells so, and what is unknown therefore. Any other error is passed on.
func (p *planner) may(err error, what, consequence string) (bool, error) {
	switch {
	case err == nil:
		return true, nil
	case apierrors.IsForbidden(err):
		p.result.Unknown = append(p.result.Unknown, fmt.Sprintf("cannot %s: forbidden; %s", what, consequence))
		return false, nil
	}
	return false, fmt.Errorf("%s: %w", what, err)
}

// checkSpec tells what is wrong with the spec, whatever is in the cluster.
func (p *planner) checkSpec() {
	target := p.resource.Spec.Target
	selection, skipped, err := impsync.CompileSelection(target.Namespaces, target.NamespacesWithPods)
	switch {
	case err != nil:
		p.refuse(ConflictSpec, "%v", err)
	case target.Secret.Name == "" && selection.HasRules():
		p.refuse(ConflictSpec, "spec.target.secret.name is empty")
	case target.Secret.Name != "":
		if err := p.targetNameAllowed(target.Secret.Name); err != nil {
			p.refuse(ConflictAllowed, "%v", err)
		}
	}
	_, skippedAccounts := impsync.CompileAccounts(target.ServiceAccounts)
	for _, err := range append(skipped, skippedAccounts...) {
		p.conflict(ConflictSpec, "", "%v; this selector is left out, the others are served", err)
	}
	if refused := p.rescueRefused(target.Rescue); refused != "" {
		p.conflict(ConflictAllowed, "", "%s", refused)
	}
}

// planSource is a source that could be read.
type planSource struct {
	key    string
	config dockerconfig.Config
}

// planSources finds out which registries the Secret would hold.
func (p *planner) planSources(ctx context.Context) error {
	var sources []planSource
	forbidden := false
	keys := ecrKeys{}
	for i, entry := range p.resource.Spec.Registry.Credentials {
		source := planSource{key: entry.Namespace + "." + entry.Name}
		switch {
		case entry.ECR != nil:
			source.key = keys.of(*entry.ECR)
			registries, err := p.registriesOf(*entry.ECR)
			if err != nil {
				p.conflict(ConflictSource, "", "source %s: %v", source.key, err)
				continue
			}
			source.config = plannedTokens(registries)
			sources = append(sources, source)
			continue
		case entry.Name == "" || entry.Namespace == "":
			p.conflict(ConflictSpec, "", "spec.registry.credentials[%d]: give either name and namespace of a Secret, or ecr", i)
			continue
		}
		if err := p.sourceNamespaceAllowed(entry.Namespace); err != nil {
			p.conflict(ConflictAllowed, "", "source %s: %v", source.key, err)
			continue
		}
		secret, err := p.core.Secrets(entry.Namespace).Get(ctx, entry.Name, metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			p.conflict(ConflictSource, "", "source %s: not found", source.key)
			continue
		}
		may, err := p.may(err, "get Secret "+entry.Namespace+"/"+entry.Name, "its registries are unknown")
		if err != nil {
			return err
		}
		if !may {
			forbidden = true
			continue
		}
		read := sourceOf(secret, p.config.ECRSources)
		if read.err != nil {
			p.conflict(ConflictSource, "", "source %s: %v", source.key, read.err)
			continue
		}
		if source.config = read.config; len(read.registries) > 0 {
			source.config = plannedTokens(read.registries)
		}
		sources = append(sources, source)
	}
	if len(sources) == 0 && !forbidden && len(p.resource.Spec.Registry.Credentials) > 0 {
		p.refuse(ConflictSource, "no source gives credentials, so there is no Secret to deliver")
	}
	merged := mergeSources(sources)
	p.result.Registries = plannedRegistries(sources, merged)
	if err := p.renderable(merged); err != nil {
		p.refuse(ConflictSpec, "%v", err)
	}
	return nil
}

// plannedTokens stands for the tokens that ECR would give: a plan asks for none.
func plannedTokens(registries []Registry) dockerconfig.Config {
	var entries []dockerconfig.Entry
	for _, r := range registries {
		entries = append(entries, r.entry(dockerconfig.NewSensitive("a token of ECR")))
	}
	config, err := dockerconfig.New(entries...)
	if err != nil {
		return dockerconfig.Config{} // the same, and nothing to show: hosts were parsed
	}
	return config
}

func mergeSources(sources []planSource) dockerconfig.Config {
	var configs []dockerconfig.Config
	for _, s := range sources {
		configs = append(configs, s.config)
	}
	return dockerconfig.Merge(configs...)
}

// renderable returns why the merged credentials cannot be delivered.
func (p *planner) renderable(merged dockerconfig.Config) error {
	config, err := merged.Render()
	if err != nil {
		return fmt.Errorf("render the merged credentials: %w", err)
	}
	ref, target := impsync.RefOf(p.resource), p.resource.Spec.Target
	secret, err := impsync.NewTarget(ref, target.Secret, 1, config)
	if err != nil {
		return err
	}
	_, err = impsync.EncodeRendered(impsync.Rendered{
		FormatVersion: 1, Resource: ref, Namespaces: target.Namespaces, Pods: target.NamespacesWithPods, Target: secret,
	})
	return err
}

// plannedRegistries returns the registries of merged sources, and whose each is.
func plannedRegistries(sources []planSource, merged dockerconfig.Config) []PlannedRegistry {
	holders := map[string][]int{} // sources by registry, in listed order
	for i, s := range sources {
		for _, e := range s.config.Entries() {
			registry := registryOf(e)
			// Several spellings of a registry in one source count once.
			if held := holders[registry]; len(held) == 0 || held[len(held)-1] != i {
				holders[registry] = append(held, i)
			}
		}
	}
	registries := []PlannedRegistry{}
	for _, e := range merged.Entries() {
		held := holders[registryOf(e)]
		last := len(held) - 1
		planned := PlannedRegistry{Registry: e.Registry(), Source: sources[held[last]].key}
		for _, i := range held[:last] {
			planned.Overrides = append(planned.Overrides, sources[i].key)
		}
		registries = append(registries, planned)
	}
	slices.SortStableFunc(registries, func(a, b PlannedRegistry) int { return strings.Compare(a.Registry, b.Registry) })
	return registries
}

// registryOf returns the same for all keys that dockerconfig.Merge takes for one registry.
func registryOf(e dockerconfig.Entry) string {
	registry, _ := dockerconfig.Normalize(e.Key.Reveal()) // an entry of a config has a key that can be normalised
	if registry == "index.docker.io" {
		return "docker.io"
	}
	return registry
}

// planNamespaces finds out what would become of the Secret in each selected namespace.
func (p *planner) planNamespaces(ctx context.Context, alongside []*v1alpha1.ImagePullSecret) error {
	resources, err := p.listResources(ctx)
	if err != nil {
		return err
	}
	if was, exists := resources[p.resource.Name]; exists {
		p.result.Exists = true
		if was.DeletionTimestamp != nil {
			p.refuse(ConflictSpec, "the ImagePullSecret of that name is being deleted, and is no longer served")
		}
	}
	view := &clusterView{}
	if view.namespaces, view.complete, err = p.listNamespaces(ctx); err != nil {
		return err
	}
	self, others := claimants(resources, alongside, p.resource)
	claim := newPlannedClaim(self, p.resource, view.complete)
	if claim == nil {
		return nil // a selector that cannot be evaluated, which checkSpec has told
	}
	for _, other := range others {
		if rival := newPlannedClaim(impsync.RefOf(other), other, view.complete); rival != nil {
			view.rivals = append(view.rivals, rival)
		}
	}
	if err := p.listPods(ctx, append(slices.Clone(view.rivals), claim)); err != nil {
		return err
	}
	if view.secrets, view.seesSecrets, err = p.listSecrets(ctx); err != nil {
		return err
	}
	p.judge(view, claim)
	return p.countAccounts(ctx)
}

// countAccounts counts the ServiceAccounts that would name the Secret.
func (p *planner) countAccounts(ctx context.Context) error {
	accounts, _ := impsync.CompileAccounts(p.resource.Spec.Target.ServiceAccounts)
	if accounts == nil {
		return nil
	}
	counts := map[string]int{}
	err := p.eachMetadata(ctx, impsync.ServiceAccountResource, fields.Everything(), func(m *metav1.PartialObjectMetadata) {
		if accounts.Matches(m.Name, m.Labels) {
			counts[m.Namespace]++
		}
	})
	may, err := p.may(err, "list ServiceAccounts", "how many would name the Secret is unknown")
	if !may {
		return err
	}
	for i := range p.result.Namespaces {
		switch n := &p.result.Namespaces[i]; n.Outcome {
		case PlanExcluded, PlanTerminating, PlanRefused:
		default:
			count := counts[n.Name]
			n.ServiceAccounts = &count
		}
	}
	return nil
}

// claimants returns what identifies the resource in the cluster, or would, and the other
// resources that want the same Secret, by name.
func claimants(inCluster map[string]*v1alpha1.ImagePullSecret, alongside []*v1alpha1.ImagePullSecret, r *v1alpha1.ImagePullSecret) (self impsync.ResourceRef, others []*v1alpha1.ImagePullSecret) {
	all := maps.Clone(inCluster)
	// Creation times are whole seconds; a new resource is younger than all that are there.
	next := metav1.NewTime(time.Now().Truncate(time.Second).Add(time.Second))
	for _, planned := range append(slices.Clone(alongside), r) {
		planned = planned.DeepCopy()
		planned.UID, planned.CreationTimestamp, planned.DeletionTimestamp = "", next, nil
		if was := inCluster[planned.Name]; was != nil {
			planned.UID, planned.CreationTimestamp, planned.DeletionTimestamp = was.UID, was.CreationTimestamp, was.DeletionTimestamp
		}
		all[planned.Name] = planned
	}
	for _, name := range slices.Sorted(maps.Keys(all)) {
		other := all[name]
		if name == r.Name {
			self = impsync.RefOf(other)
		} else if other.DeletionTimestamp == nil && other.Spec.Target.Secret.Name == r.Spec.Target.Secret.Name {
			others = append(others, other)
		}
	}
	return self, others
}

// plannedClaim is a resource that wants the Secret.
type plannedClaim struct {
	ref   impsync.ResourceRef
	names []string
	// rules are the namespace selectors, one for each kind.
	rules []selectionRule
	// pods has the selectors of Pods, and demand the namespaces in which they match one.
	pods   *impsync.Selection
	demand map[string]struct{}
}

type selectionRule struct {
	kind      string
	selection *impsync.Selection
}

// newPlannedClaim returns nil where a selector cannot be evaluated. Where not all
// namespaces are known, their labels and annotations are not either.
func newPlannedClaim(ref impsync.ResourceRef, r *v1alpha1.ImagePullSecret, complete bool) *plannedClaim {
	target := r.Spec.Target
	c := &plannedClaim{ref: ref, names: target.Namespaces.Names, demand: map[string]struct{}{}}
	selectors := []struct {
		kind     string
		selector v1alpha1.NamespaceSelector
	}{
		{"name", v1alpha1.NamespaceSelector{Names: target.Namespaces.Names}},
		{"label", v1alpha1.NamespaceSelector{Labels: target.Namespaces.Labels}},
		{"annotation", v1alpha1.NamespaceSelector{Annotations: target.Namespaces.Annotations}},
	}
	for _, s := range selectors {
		selection, _, err := impsync.CompileSelection(s.selector, target.NamespacesWithPods)
		if err != nil {
			return nil
		}
		c.pods = selection
		if complete || s.kind == "name" {
			c.rules = append(c.rules, selectionRule{s.kind, selection})
		}
	}
	return c
}

// selectedBy returns the kinds of selector that match a namespace.
func (c *plannedClaim) selectedBy(name string, meta namespaceMeta) []string {
	var kinds []string
	for _, rule := range c.rules {
		if rule.selection.SelectsByRule(name, meta.labels, meta.annotations) {
			kinds = append(kinds, rule.kind)
		}
	}
	if _, ok := c.demand[name]; ok {
		kinds = append(kinds, "pods")
	}
	return kinds
}

// clusterView is what the caller sees of the cluster.
type clusterView struct {
	namespaces map[string]namespaceMeta
	// complete: these are all namespaces.
	complete bool
	// rivals are the other resources that want the Secret.
	rivals []*plannedClaim
	// secrets are those of the Secret's name, by namespace.
	secrets     map[string]impsync.Existing
	seesSecrets bool
}

// candidates returns the namespaces that may be selected, sorted.
func (v *clusterView) candidates(claim *plannedClaim) []string {
	names := slices.Collect(maps.Keys(v.namespaces))
	if !v.complete {
		names = append(slices.AppendSeq(names, maps.Keys(claim.demand)), claim.names...)
	}
	slices.Sort(names)
	return slices.Compact(names)
}

// judge tells for each namespace what would become of the Secret there.
func (p *planner) judge(view *clusterView, claim *plannedClaim) {
	excludedCount, terminatingCount := 0, 0
	for _, name := range view.candidates(claim) {
		meta := view.namespaces[name]
		planned := PlannedNamespace{Name: name, SelectedBy: claim.selectedBy(name, meta)}
		switch {
		case len(planned.SelectedBy) == 0:
			continue
		case p.config.Excluded.Matches(name):
			planned.Outcome = PlanExcluded
			excludedCount++
		case meta.terminating:
			planned.Outcome = PlanTerminating
			terminatingCount++
		case p.refused:
			planned.Outcome = PlanRefused
		default:
			planned.Outcome = p.judgeSecret(view, claim, name, meta)
		}
		p.result.Namespaces = append(p.result.Namespaces, planned)
	}
	if excludedCount > 0 {
		p.note("namespaces that get nothing, as --excluded-namespaces (%s) has them: %d", strings.Join(p.config.Excluded, ", "), excludedCount)
	}
	if terminatingCount > 0 {
		p.note("namespaces that get nothing, as they are being deleted: %d", terminatingCount)
	}
	for _, name := range claim.names {
		if _, ok := view.namespaces[name]; !ok && view.complete {
			p.note("namespace %q does not exist; it gets the Secret once it does", name)
		}
	}
}

func (p *planner) judgeSecret(view *clusterView, claim *plannedClaim, namespace string, meta namespaceMeta) PlanOutcome {
	claimed := false
	for _, rival := range view.rivals {
		switch {
		case len(rival.selectedBy(namespace, meta)) == 0:
		case rival.ref.Compare(claim.ref) < 0:
			claimed = true
			p.conflict(ConflictOlder, namespace, "the older ImagePullSecret %s claims the same Secret, and wins", rival.ref.Name)
		default:
			p.conflict(ConflictYounger, namespace, "the younger ImagePullSecret %s claims the same Secret, and loses", rival.ref.Name)
		}
	}
	existing, there := view.secrets[namespace]
	switch {
	case there && existing.Ownership == impsync.Foreign:
		p.conflict(ConflictForeign, namespace, "a Secret of that name is there that is not imps's, and is left alone")
		return PlanForeign
	case there && existing.Deleting:
		p.conflict(ConflictHeld, namespace, "the Secret is being deleted, and a finalizer holds it")
		return PlanHeld
	case claimed:
		return PlanClaimed
	case !view.seesSecrets:
		return PlanUnknown
	case !there:
		return PlanCreate
	case existing.Ownership == impsync.Ours && existing.OwnerUID == claim.ref.UID:
		return PlanUpdate
	default:
		return PlanAdopt
	}
}

// listResources returns the ImagePullSecrets of the cluster by name.
func (p *planner) listResources(ctx context.Context) (map[string]*v1alpha1.ImagePullSecret, error) {
	resources := map[string]*v1alpha1.ImagePullSecret{}
	object, err := cache.ToListerWithContext(imagesListWatch(p.Coordinator)).ListWithContext(ctx, metav1.ListOptions{})
	if apierrors.IsNotFound(err) {
		p.note("the cluster does not know ImagePullSecrets yet: install the chart first")
		return resources, nil
	}
	may, err := p.may(err, "list ImagePullSecrets", "whether there is one of that name, or others that claim the same Secret, is unknown")
	if !may {
		return resources, err
	}
	list, ok := object.(*v1alpha1.ImagePullSecretList)
	if !ok {
		return nil, errors.New("list ImagePullSecrets: the API server's answer is no list of them")
	}
	for i := range list.Items {
		resources[list.Items[i].Name] = &list.Items[i]
	}
	return resources, nil
}

// listNamespaces returns all namespaces, or false where the caller may not see them.
func (p *planner) listNamespaces(ctx context.Context) (map[string]namespaceMeta, bool, error) {
	namespaces := map[string]namespaceMeta{}
	err := p.eachMetadata(ctx, impsync.NamespaceResource, fields.Everything(), func(m *metav1.PartialObjectMetadata) {
		namespaces[m.Name] = namespaceMeta{labels: m.Labels, annotations: m.Annotations, terminating: m.DeletionTimestamp != nil}
	})
	may, err := p.may(err, "list Namespaces", "only those that names or Pods select are shown")
	return namespaces, may, err
}

// listPods finds the namespaces that Pods select. As for the duties, a Pod counts from its
// binding on.
func (p *planner) listPods(ctx context.Context, claims []*plannedClaim) error {
	claims = slices.DeleteFunc(claims, func(c *plannedClaim) bool { return !c.pods.HasPodRules() })
	if len(claims) == 0 {
		return nil
	}
	pods, bound := schema.GroupVersionResource{Version: "v1", Resource: "pods"}, fields.OneTermNotEqualSelector("spec.nodeName", "")
	err := p.eachMetadata(ctx, pods, bound, func(m *metav1.PartialObjectMetadata) {
		for _, c := range claims {
			if c.pods.MatchesPod(m.Labels, m.Annotations) {
				c.demand[m.Namespace] = struct{}{}
			}
		}
	})
	_, err = p.may(err, "list Pods", "the namespaces that only Pods select are unknown")
	return err
}

// listSecrets returns the Secrets of the target's name, or false where the caller may not
// see them.
func (p *planner) listSecrets(ctx context.Context) (map[string]impsync.Existing, bool, error) {
	secrets := map[string]impsync.Existing{}
	name := p.resource.Spec.Target.Secret.Name
	if name == "" {
		return secrets, true, nil
	}
	err := p.eachMetadata(ctx, impsync.SecretResource, fields.OneTermEqualSelector(metav1.ObjectNameField, name), func(m *metav1.PartialObjectMetadata) {
		secrets[m.Namespace] = impsync.ExistingOf(m)
	})
	may, err := p.may(err, "list Secrets named "+name, "whether foreign ones are in the way is unknown")
	return secrets, may, err
}

// eachMetadata lists the metadata of a resource in all namespaces, page by page.
func (p *planner) eachMetadata(ctx context.Context, resource schema.GroupVersionResource, selector fields.Selector, each func(*metav1.PartialObjectMetadata)) error {
	pages := pager.New(func(ctx context.Context, options metav1.ListOptions) (runtime.Object, error) {
		return p.metadata.Resource(resource).List(ctx, options)
	})
	pages.PageSize = planPageSize
	return pages.EachListItem(ctx, metav1.ListOptions{FieldSelector: selector.String()}, func(o runtime.Object) error {
		m, ok := o.(*metav1.PartialObjectMetadata)
		if !ok {
			return errors.New("the API server's answer is no metadata")
		}
		each(m)
		return nil
	})
}
